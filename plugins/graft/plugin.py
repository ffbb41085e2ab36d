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
        networks=f"{_HERE}.exporting:networks",
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
def medrl_register_losses(registry: Any) -> None:
    """Register the losses: against labels as classes, of features and logits as functions."""
    add, losses = registry.add, f"{_HERE}.losses"
    add("focal_dice", f"{losses}:FocalDice", summary="focal loss minus Dice, for regions")
    add("bce_dice", f"{losses}:BceDice", summary="weighted cross-entropy minus Dice, for regions")
    add("dice_ce", f"{losses}:DiceCrossEntropy", summary="foreground Dice and cross-entropy, for classes")
    add("iou", f"{losses}:IoULoss", summary="1 - intersection over union")
    add("tversky", f"{losses}:TverskyLoss", summary="misses count more than false alarms")
    add("softmax_focal", f"{losses}:SoftmaxFocal", summary="focal loss of exclusive classes")
    add("nnunet", f"{losses}:NnunetLoss", summary="nnU-Net's Dice and cross-entropy")
    add("brats", f"{losses}:BratsLoss", summary="three tumour regions, foreground weights 3, 7, 15")
    add("feature_cosine", f"{losses}:cosine_distance", summary="2(1 - cos) of whole samples, or of voxels")
    add("feature_mse", f"{losses}:mse_distance", summary="squared distance to standardised features")
    add("feature_smooth_l1", f"{losses}:smooth_l1_distance", summary="smooth L1 to standardised features")
    add("feature_kl", f"{losses}:kl_distance", summary="KL of features as distributions over voxels")
    add("logit_l1", f"{losses}:probability_distance", summary="mean distance of sigmoid probabilities")
    add("logit_kl", f"{losses}:kl_divergence", summary="KL at temperature T")
    add("logit_contrastive", f"{losses}:contrastive", summary="margin between the teacher's two top classes")
    add("logit_relation", f"{losses}:relation", summary="likeness between the samples of a batch")
    add("logit_angular", f"{losses}:angular", summary="published under this name; plain KL")


@hookimpl
def medrl_register_agents(registry: Any) -> None:
    """Register the policies that score teachers."""
    registry.add(
        "teacher", f"{_HERE}.agent:TeacherPolicy", summary="scores from what it sees of each teacher"
    )
    registry.add("free", f"{_HERE}.agent:FreePolicy", summary="one score for each teacher, without a state")


@hookimpl
def medrl_register_rewards(registry: Any) -> None:
    """Register the reward of the agent."""
    target = f"{_HERE}.weighting:composite_reward"
    registry.add("composite", target, summary="Dice over the ensemble's, minus cross-entropy")


@hookimpl
def medrl_register_datasets(registry: Any) -> None:
    """Register the readers of datasets."""
    registry.add("cohorts", f"{_HERE}.cohorts:open_cohorts", summary="several cohorts in one YAML file")


@hookimpl
def medrl_register_commands(commands: Any) -> None:
    """Register train, predict, demo and the two tools that make teachers."""
    commands.train(f"{_HERE}.commands:train")
    commands.predict(f"{_HERE}.commands:predict")
    commands.demo(f"{_HERE}.commands:demo")
    commands.tool(f"{_HERE}.commands:train_teachers")
    commands.tool(f"{_HERE}.commands:extract_features")
    commands.tool(f"{_HERE}.data_commands:import_features")
    commands.evaluate(f"{_HERE}.data_commands:evaluate")
