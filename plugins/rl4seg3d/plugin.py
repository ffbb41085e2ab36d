"""rl4seg3d: what this method adds to medrl. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from medrl.core import PluginInfo, hookimpl

_HERE = "medrl.plugins.rl4seg3d"


@hookimpl
def medrl_plugin_info() -> PluginInfo:
    """Say who this is."""
    return PluginInfo(
        name="rl4seg3d",
        api=1,
        summary="segment echo sequences, adapted to unlabelled ones by PPO and learned rewards",
        paper="Judge et al., RL4Seg3D, arXiv 2510.14244 (github.com/arnaudjudge/RL4Seg3D)",
        license="Apache-2.0",
        config=f"{_HERE}.config:Rl4seg3dConfig",
        networks=f"{_HERE}.exporting:networks",
        trial=f"{_HERE}.trial:write",
    )


@hookimpl
def medrl_register_models(registry: Any) -> None:
    """Register the networks."""
    add, models = registry.add, f"{_HERE}.models"
    add("unet3d", f"{models}:UNet3d", summary="3D U-Net of six levels, 30.4 M parameters")
    add("unet3d_small", f"{models}:SmallUNet3d", summary="3D U-Net on folded pixels, for CPUs")


@hookimpl
def medrl_register_rewards(registry: Any) -> None:
    """Register the rewards of label maps on windows of frames."""
    add, rewards = registry.add, "medrl.core.adaptation.rewards"
    add("learned", f"{_HERE}.rewards:FusedReward", summary="reward nets made one, and the corrector")
    add("pixelwise_accuracy", f"{rewards}:PixelwiseAccuracy", summary="oracle: 1 where the label is right")
    add("accuracy_map", f"{rewards}:AccuracyMap", summary="oracle: accuracy of the window, in every voxel")
    add("accuracy", f"{rewards}:Accuracy", summary="oracle: accuracy of the window, one number")
    add("random", f"{rewards}:RandomReward", summary="control: noise")


@hookimpl
def medrl_register_commands(commands: Any) -> None:
    """Register train, predict, demo, and the tools: conversion of weights, single stages."""
    commands.train(f"{_HERE}.commands_train:train")
    commands.demo(f"{_HERE}.commands_train:demo")
    commands.predict(f"{_HERE}.commands:predict")
    commands.tool(f"{_HERE}.commands:convert")
    for name in ("pretrain", "train_corrector", "train_reward", "ppo"):
        commands.tool(f"{_HERE}.commands_stages:{name}")
