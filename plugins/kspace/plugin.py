"""kspace: what this method adds to medrl. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from medrl.core import PluginInfo, hookimpl

_HERE = "medrl.plugins.kspace"


@hookimpl
def medrl_plugin_info() -> PluginInfo:
    """Say who this is."""
    return PluginInfo(
        name="kspace",
        api=1,
        summary="choose lines of k-space one by one, for the image and its segmentation",
        paper="ASMR, Yen et al., ICML 2024 (github.com/robinyen/asmr); github.com/Hanson1331/ICASSP2025",
        license="Apache-2.0",
        config=f"{_HERE}.config:KspaceConfig",
        networks=f"{_HERE}.exporting:networks",
        trial=f"{_HERE}.trial:write",
    )


@hookimpl
def medrl_register_models(registry: Any) -> None:
    """Register the networks that segment, and one that reconstructs."""
    add, models = registry.add, f"{_HERE}.models"
    add("unet", f"{models}:UNet", summary="U-Net of milesial, 31 M parameters")
    add("unetpp", f"{models}:UNetPlusPlus", summary="U-Net++ in the style of nnU-Net, 24 M parameters")
    add("unext", f"{models}:UNeXt", summary="UNeXt, 1.5 M parameters")
    add("unext_s", f"{models}:SmallUNeXt", summary="UNeXt-S, 0.25 M parameters")
    add("compact", f"{models}:CompactNet", summary="U-Net on folded pixels, 42 k parameters, for CPUs")
    add(
        "recon_unet",
        f"{models}:ReconUNet",
        summary="fastMRI's U-Net, which improves images, 7.8 M parameters",
    )


@hookimpl
def medrl_register_agents(registry: Any) -> None:
    """Register the policies over lines."""
    agent = f"{_HERE}.agent"
    registry.add("columns", f"{agent}:ColumnAgent", summary="convolution over features of every column")
    registry.add("faithful", f"{agent}:FaithfulAgent", summary="ResNet-18 on the image, as ASMR")


@hookimpl
def medrl_register_environments(registry: Any) -> None:
    """Register the acquisition of lines."""
    registry.add("lines", f"{_HERE}.playing:lines", summary="acquire a line of k-space in every step")


@hookimpl
def medrl_register_datasets(registry: Any) -> None:
    """Register the readers of datasets."""
    add, data = registry.add, f"{_HERE}.data"
    add("scans", f"{data}:open_scans", summary="whatever reader recognises the folder or file")
    add("acdc_nifti", f"{data}.images:open_acdc_nifti", summary="ACDC as it is published")
    add("acdc_h5", f"{data}.images:open_acdc_h5", summary="ACDC as HDF5 files of slices")
    add("acdc_png", f"{data}.png:open_acdc_png", summary="ACDC as PNG slices with a sidecar")
    add("fastmri", f"{data}.fastmri:open_fastmri", summary="fastMRI, one or several coils")
    add("ismrmrd", f"{data}.mrd:open_ismrmrd", summary="ISMRMRD raw data")
    add("bart", f"{data}.bart:open_bart", summary="BART .cfl and .hdr")


@hookimpl
def medrl_register_rewards(registry: Any) -> None:
    """Register what a line is paid."""
    add, rewards = registry.add, f"{_HERE}.rewards"
    add("delta", f"{rewards}:delta_reward", summary="what SSIM and soft Dice gain with each line")
    add("terminal", f"{rewards}:terminal_reward", summary="SSIM and soft Dice at the end")
    add("asmr", f"{rewards}:asmr_reward", summary="squashed log-probability of the true labels (ASMR)")


@hookimpl
def medrl_register_commands(commands: Any) -> None:
    """Register train, predict, evaluate, demo, and the tools."""
    here = f"{_HERE}.commands"
    commands.train(f"{here}:train")
    commands.predict(f"{here}:predict")
    commands.demo(f"{here}:demo")
    for name in ("train_reward", "train_recon", "make_sampler", "evaluate", "baselines", "export_mask"):
        commands.tool(f"{here}:{name}")
    commands.tool(f"{here}:export_png")
