"""The parts of a config: networks, reconstruction, features, agent, reward; trained parts of other runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from medrl.core.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, load_into
from medrl.core.errors import CheckpointError, ConfigError

from .agent import LineAgent
from .cases import Cases
from .config import KspaceConfig
from .features import BLIND, ColumnFeatures
from .imaging import Imaging, Reconstruction, logits_of
from .models import ReconUNet
from .observer import CaseObserver
from .rewards import Quality, Reward

if TYPE_CHECKING:
    from medrl.core.config import ModelConfig
    from medrl.core.manager import PluginManager

_TRIAL = 32
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


# -- networks ----------------------------------------------------------------------------------------


def segmenter(cfg: KspaceConfig, manager: PluginManager, *, classes: int) -> nn.Module:
    """Build the reward model with new weights; of three dimensions for geometry `volume3d`.

    Raises:
        ConfigError: The network does not take such images, or gives something else than logits.
    """
    dims = 3 if cfg.acquisition.geometry == "volume3d" else 2
    network = _built(
        cfg.model, manager, "models", {"in_channels": 1, "out_channels": classes, "spatial_dims": dims}
    )
    _try(network, cfg.model.name, dims, classes)
    return network


def recon_network(cfg: KspaceConfig, manager: PluginManager) -> ReconUNet:
    """Build the reconstruction network with new weights.

    Raises:
        ConfigError: It is no `ReconUNet`.
    """
    network = _built(cfg.recon_model, manager, "models", {})
    if not isinstance(network, ReconUNet):
        raise ConfigError(
            f"recon_model.name {cfg.recon_model.name}",
            why="it does not reconstruct",
            do="recon_model.name=kspace.recon_unet",
        )
    return network


def trained_recon(cfg: KspaceConfig, manager: PluginManager) -> ReconUNet:
    """Return the reconstruction network that `inputs.recon` names, frozen.

    Raises:
        ConfigError: None is named.
    """
    if cfg.inputs.recon is None:
        raise ConfigError(
            "acquisition.recon unet",
            why="no trained reconstruction is named",
            do="medrl kspace train-recon, then --recon-run RUN",
        )
    network = recon_network(cfg, manager)
    load_part(cfg.inputs.recon, "recon", network, "inputs.recon")
    return network.requires_grad_(requires_grad=False).eval()


def imaging(
    cfg: KspaceConfig,
    network: nn.Module | None,
    recon: ReconUNet | None = None,
    *,
    precision: str | None = None,
) -> Imaging:
    """Join segmentation and reconstruction; both are frozen by this.

    Args:
        cfg: The config.
        network: Segments, if there are labels.
        recon: Needed for acquisition.recon `unet`.
        precision: Of the networks; None takes train.precision.
    """
    kind = cfg.acquisition.recon
    reconstruction: Reconstruction = "zf"
    if kind == "unet":
        if recon is None:
            raise ConfigError("acquisition.recon unet", why="no reconstruction network is there")
        reconstruction = recon
    elif kind == "sense":
        reconstruction = "sense"
    return Imaging(
        network,
        reconstruction=reconstruction,
        autocast=DTYPES[precision or cfg.train.precision],
        channels_last=True,
    )


# -- policy ------------------------------------------------------------------------------------------


def column_features(cfg: KspaceConfig, cases: Cases, seen: Imaging, classes: int) -> ColumnFeatures:
    """Return what a column agent reads; with `blind` lines and counters alone."""
    if cfg.blind:
        return ColumnFeatures(cases, groups=BLIND)
    known = seen.segmenter is not None
    return ColumnFeatures(
        cases,
        groups=cfg.features,
        classes=classes if known else 0,
        predicts=seen.predicts,
        deep=seen.deep,
    )


def agent(
    cfg: KspaceConfig, manager: PluginManager, cases: Cases, features: ColumnFeatures | None
) -> LineAgent:
    """Build the network of the policy for cases of this kind.

    Raises:
        ConfigError: It is no `LineAgent`, cannot be blind, or cannot count the largest budget.
    """
    offered: dict[str, Any] = {"actions": cases.actions, "image_shape": cases.image_shape[-2:]}
    if features is not None:
        offered |= {"features": len(features.names), "pooled": len(features.pooled_names), "blind": cfg.blind}
    network = _built(cfg.agent, manager, "agents", offered)
    if not isinstance(network, LineAgent):
        raise ConfigError(f"agent.name {cfg.agent.name}", why="it does not choose lines of k-space")
    if cfg.blind and network.needs != "lines":
        raise ConfigError(
            f"agent.name {cfg.agent.name}", why="it cannot be blind", do="--set agent.name=kspace.columns"
        )
    network.check_budget(max(cfg.budget.train[1], *cfg.budget.eval))
    return network


def reads_features(cfg: KspaceConfig, manager: PluginManager) -> bool:
    """Whether the agent of a config reads features of columns, and not an image."""
    return "features" in inspect.signature(manager.registry("agents").get(cfg.agent.name)).parameters


def observer(
    cfg: KspaceConfig, manager: PluginManager, cases: Cases, seen: Imaging, *, classes: int
) -> CaseObserver:
    """Return what turns observations of these cases into what the agent reads."""
    features = None
    if reads_features(cfg, manager):
        features = column_features(cfg, cases, seen, classes)
    return CaseObserver(cases, seen, features)


def quality(cfg: KspaceConfig) -> Quality:
    """λ1 · reconstruction + λ2 · segmentation, as the config weighs them."""
    reward = cfg.reward
    if reward.mode == "asmr":
        return Quality(image_weight=0.0, label_weight=1.0, of_labels="log_prob")
    return Quality(
        image_weight=reward.rec,
        label_weight=reward.seg,
        of_image=reward.rec_quality,
        of_labels=reward.seg_quality,
    )


def reward(cfg: KspaceConfig) -> Reward:
    """What each line is paid."""
    return Reward(quality(cfg), mode=cfg.reward.mode, delay=cfg.reward.delay_step)


# -- trained parts -----------------------------------------------------------------------------------


def open_part(path: Path, name: str, what: str) -> Checkpoint:
    """Open a checkpoint of kspace that holds a part.

    Args:
        path: Run folder or checkpoint.
        name: Name of the part in the checkpoint.
        what: The setting that names it, for messages.

    Raises:
        ConfigError: The path does not exist.
        CheckpointError: It holds no such part.
    """
    if not path.exists():
        raise ConfigError(what, why=f"{path} does not exist", do="name a run folder or a checkpoint")
    which = "best" if path.is_dir() and (path / "checkpoints" / "best.pt").is_file() else "last"
    found = load_checkpoint(find_checkpoint(path, which), method="kspace")
    if name not in found.states:
        raise CheckpointError(
            f"checkpoint {found.path}",
            why=f"it holds no {name}, only {', '.join(sorted(found.states))}",
            do=f"name another run with --set {what}=RUN",
        )
    return found


def load_part(path: Path, name: str, module: nn.Module, what: str) -> Checkpoint:
    """Fill a module from a checkpoint; arguments as in `open_part`."""
    found = open_part(path, name, what)
    load_into(module, cast("Mapping[str, Tensor]", found.states[name]))
    return found


# -- private -----------------------------------------------------------------------------------------


def _built(config: ModelConfig, manager: PluginManager, kind: str, offered: Mapping[str, Any]) -> nn.Module:
    """Build a registered network with what it takes of the offered arguments, and with its own settings."""
    registry = manager.registry(kind)
    taken = inspect.signature(registry.get(config.name)).parameters
    every = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in taken.values())
    given = {name: value for name, value in offered.items() if every or name in taken}
    found: nn.Module = registry.build(config.name, **{**given, **config.params})
    return found


def _try(network: nn.Module, name: str, dims: int, classes: int) -> None:
    image = torch.zeros(1, 1, *([_TRIAL] * dims))
    training = network.training
    network.eval()
    wrong = ""
    try:
        with torch.no_grad():
            found = logits_of(network(image))
        if tuple(found.shape) != (1, classes, *image.shape[2:]):
            wrong = f"it maps an image {tuple(image.shape)} to {tuple(found.shape)}"
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        wrong = f"it does not take a {dims}D image: {str(error).strip().splitlines()[0]}"
    network.train(training)
    if wrong:
        raise ConfigError(f"model.name {name}", why=wrong, do="choose a segmentation network: kspace.unet")
