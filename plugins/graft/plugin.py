"""graft: what this method adds to medrl. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from medrl.core import PluginInfo, hookimpl

_HERE = "medrl.plugins.graft"


@hookimpl
def medrl_plugin_info() -> PluginInfo:
    """Say who this is."""
    return PluginInfo(
        name="graft",
        api=1,
        summary="distil an ensemble of teachers into one 3D U-Net",
        paper="GRAFT, PIMED group, Stanford (github.com/pimed/GRAFT)",
        license="Apache-2.0",
        config=f"{_HERE}.config:GraftConfig",
    )


@hookimpl
def medrl_register_models(registry: Any) -> None:
    """Register the student networks."""
    add, models = registry.add, f"{_HERE}.models"
    add("tiny", f"{models}:TinyUNet", summary="4 stages, 0.3 M parameters, for CPUs and tests")
    add("fullres", f"{models}:FullResUNet", summary="nnU-Net 3d_fullres, 7 stages, 44.6 M parameters")
    add("medium", f"{models}:MediumUNet", summary="fullres with 1.5 times the channels, 100 M parameters")
    add("large", f"{models}:LargeUNet", summary="fullres with twice the channels, 178 M parameters")
    add(
        "brats", f"{models}:BratsUNet", summary="nnU-Net for four MR channels, cubic kernels, 31 M parameters"
    )
    add("unet3d", f"{models}:UNet3D", summary="MONAI's plain 3D U-Net")
    add("swin", f"{models}:SwinUNETRStudent", summary="MONAI's Swin-UNETR")


@hookimpl
def medrl_register_commands(commands: Any) -> None:
    """Register train, predict, demo and the two tools that make teachers."""
    commands.train(f"{_HERE}.commands:train")
    commands.predict(f"{_HERE}.commands:predict")
    commands.demo(f"{_HERE}.commands:demo")
    commands.tool(f"{_HERE}.commands:train_teachers")
    commands.tool(f"{_HERE}.commands:extract_features")
