"""rl4seg: what this method adds to medrl. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from medrl.core import PluginInfo, hookimpl

_HERE = "medrl.plugins.rl4seg"


@hookimpl
def medrl_plugin_info() -> PluginInfo:
    """Say who this is."""
    return PluginInfo(
        name="rl4seg",
        api=1,
        summary="adapt a 2D echo segmentation network to unlabelled images by PPO and a learned reward",
        paper="Judge et al., RL4Seg, MICCAI 2024 (github.com/arnaudjudge/RL4Seg)",
        license="Apache-2.0",
        config=f"{_HERE}.config:Rl4segConfig",
        networks=f"{_HERE}.exporting:networks",
        trial=f"{_HERE}.trial:write",
    )


@hookimpl
def medrl_register_models(registry: Any) -> None:
    """Register the networks."""
    add, models = registry.add, f"{_HERE}.models"
    add("unet", f"{models}:UNet", summary="2D U-Net of six levels, 7.8 M parameters")
    add("unet_small", f"{models}:SmallUNet", summary="2D U-Net on folded pixels, 0.3 M parameters, for CPUs")
    add("resnet18", f"{models}:ResNet18", summary="one number of an image, 11.2 M parameters: a critic")


@hookimpl
def medrl_register_agents(registry: Any) -> None:
    """Register the policies over the labels of each pixel."""
    add, actors = registry.add, "medrl.core.adaptation.actors"
    add("categorical", f"{actors}:CategoricalActor", summary="softmax over labels in each pixel")
    add("binary", f"{actors}:BinaryActor", summary="sigmoid of one logit in each pixel")
    add("critic", f"{actors}:Critic", summary="expected reward of an image, in each pixel or as one number")


@hookimpl
def medrl_register_rewards(registry: Any) -> None:
    """Register the rewards of label maps on images."""
    add, rewards = registry.add, "medrl.core.adaptation.rewards"
    add("composite", f"{rewards}:Composite", summary="reward net, and corrector of what it would choose")
    add("reward_unet", f"{rewards}:LearnedReward", summary="reward net alone")
    add("pixelwise_accuracy", f"{rewards}:PixelwiseAccuracy", summary="oracle: 1 where the label is right")
    add("accuracy_map", f"{rewards}:AccuracyMap", summary="oracle: accuracy of the image, in every pixel")
    add("accuracy", f"{rewards}:Accuracy", summary="oracle: accuracy of the image, one number")
    add("dice", f"{rewards}:Dice", summary="oracle: Dice of the image, one number")
    add("random", f"{rewards}:RandomReward", summary="control: noise")


@hookimpl
def medrl_register_datasets(registry: Any) -> None:
    """Register the readers of datasets."""
    add, data = registry.add, f"{_HERE}.data"
    add("camus", f"{data}:open_camus", summary="CAMUS: its folders, or img/, gt/ and a CSV file")
    add("esed", f"{data}:open_esed", summary="ES and ED frames listed in a CSV file")
    add("vital", f"{data}:open_vital", summary="CAMUS in the HDF5 file of vital")


@hookimpl
def medrl_register_commands(commands: Any) -> None:
    """Register train, predict, demo, the tools of single stages, and those that measure."""
    commands.train(f"{_HERE}.commands:train")
    commands.predict(f"{_HERE}.commands:predict")
    commands.demo(f"{_HERE}.commands_study:demo")
    for name in ("pretrain", "train_corrector", "train_reward", "ppo", "pg"):
        commands.tool(f"{_HERE}.commands:{name}")
    commands.tool(f"{_HERE}.commands_checks:check_masks")
    for name in ("compare", "ts_it", "uncertainty"):
        commands.tool(f"{_HERE}.commands_study:{name}")
