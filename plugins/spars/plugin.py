"""spars: what this method adds to medrl. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from medrl.core import PluginInfo, hookimpl

_HERE = "medrl.plugins.spars"


@hookimpl
def medrl_plugin_info() -> PluginInfo:
    """Say who this is."""
    return PluginInfo(
        name="spars",
        api=1,
        summary="find and outline a tumour from image-level labels, by windows that compete",
        paper="SPARS, arXiv 2505.18989, MIUA 2025 (github.com/catalinatan/SPARS)",
        license="Apache-2.0",
        config=f"{_HERE}.config:SparsConfig",
        networks=f"{_HERE}.exporting:networks",
        trial=f"{_HERE}.trial:write",
    )


@hookimpl
def medrl_register_models(registry: Any) -> None:
    """Register the classifiers of windows."""
    add, models = registry.add, f"{_HERE}.models"
    add("faithful", f"{models}:FaithfulNet", summary="the original: 3.6 M parameters, 256 × 256 × 180 only")
    add("compact", f"{models}:CompactNet", summary="padded, globally pooled; any window, dense scoring")


@hookimpl
def medrl_register_agents(registry: Any) -> None:
    """Register the policies of windows."""
    agent = f"{_HERE}.agent"
    registry.add("compact", f"{agent}:CompactAgent", summary="features of each volume made once; fast")
    registry.add("cnn", f"{agent}:ConvAgent", summary="3D convolutions over the volume and the window")
    registry.add("mlp", f"{agent}:FaithfulAgent", summary="two layers of 64 on the window (original)")


@hookimpl
def medrl_register_environments(registry: Any) -> None:
    """Register the hunt."""
    registry.add("hunt", f"{_HERE}.playing:hunt", summary="two windows move through a volume and compete")


@hookimpl
def medrl_register_datasets(registry: Any) -> None:
    """Register the reader."""
    registry.add("volumes", f"{_HERE}.data:open_volumes", summary="volumes with presence.csv; masks optional")


@hookimpl
def medrl_register_rewards(registry: Any) -> None:
    """Register what a move is paid."""
    add, rewards = registry.add, f"{_HERE}.rewards"
    add("sign", f"{rewards}:sign", summary="sign of the difference of scores (SPARS)")
    add("difference", f"{rewards}:difference", summary="the difference of scores itself")
    add("multiscale", f"{rewards}:multiscale", summary="the sign, of scores in windows of several sizes")
    add("shaped", f"{rewards}:shaped", summary="the sign, and what the score gained by the move")


@hookimpl
def medrl_register_commands(commands: Any) -> None:
    """Register train, predict, evaluate, demo, and the tools."""
    here = f"{_HERE}.commands"
    commands.train(f"{here}:train")
    commands.predict(f"{here}:predict")
    commands.evaluate(f"{here}:evaluate")
    commands.demo(f"{here}:demo")
    for name in ("train_classifier", "sweep"):
        commands.tool(f"{here}:{name}")
