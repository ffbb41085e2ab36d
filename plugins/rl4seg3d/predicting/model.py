"""A model of any origin: trained here, weights of others, or a TorchScript package."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from medrl.core.checkpoint import is_checkpoint, load_checkpoint
from medrl.core.errors import CheckpointError, ConfigError

from ..foreign import Scripted, load_scripted, read_weights
from ..foreign.reading import refuse_pointer
from ..io import Plan
from ..models import UNet3d
from ..predict_config import PredictConfig

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

_log = logging.getLogger("medrl.rl4seg3d")

LABELS: Mapping[str, int] = {"background": 0, "LV": 1, "MYO": 2}
"""Labels of the original."""


class RewardModel(Protocol):
    """What judges label maps on images."""

    def raw(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return what is blended over windows `(N, X, Y, T)`, for images `(N, 1, X, Y, T)` and labels."""
        ...

    def finish(self, raw: Tensor, *, calibrated: bool) -> Tensor:
        """Return the reward in [0, 1] of blended values."""
        ...

    def to(self, device: torch.device) -> RewardModel:
        """Move to a device."""
        ...


class NetReward:
    """A reward net of the original: image and label values in, one logit out.

    Args:
        network: Two channels to one.
        temperature: Divides the logit where a calibrated reward is asked for. The original fits it, and never
            uses it for maps.
    """

    def __init__(self, network: nn.Module, temperature: float = 1.0) -> None:
        self.network = network.eval().requires_grad_(requires_grad=False)
        self.temperature = temperature if temperature > 0.0 else 1.0

    def raw(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return logits."""
        found: Tensor = self.network(torch.cat([images, labels[:, None].to(images.dtype)], dim=1))
        return found[:, 0].float()

    def finish(self, raw: Tensor, *, calibrated: bool) -> Tensor:
        """Return σ(z), or σ(z / T) if calibrated."""
        return torch.sigmoid(raw / self.temperature if calibrated else raw)

    def to(self, device: torch.device) -> NetReward:
        """Move the network."""
        self.network.to(device)
        return self


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """Everything that a prediction needs.

    Attributes:
        path: The file.
        digest: Its SHA-256.
        network: Gives logits of windows; None for a package.
        scripted: A TorchScript package.
        rewards: What judges the result, by name.
        plan: How sequences are prepared.
        label_names: Values by name.
        facts: For the report.
    """

    path: Path
    digest: str
    network: nn.Module | None
    scripted: Scripted | None = None
    rewards: Mapping[str, RewardModel] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)
    label_names: Mapping[str, int] = field(default_factory=lambda: dict(LABELS))
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Names of the reward maps, without the fused one."""
        return self.scripted.reward_names if self.scripted is not None else tuple(self.rewards)


def load_model(
    path: Path, config: PredictConfig, *, device: torch.device, manager: PluginManager | None = None
) -> Model:
    """Load a model, whoever wrote it.

    Raises:
        CheckpointError: No such file, damaged, or no model of rl4seg3d.
        ConfigError: Settings do not fit the model.
    """
    refuse_pointer(path)
    if is_checkpoint(path):
        from .trained import load_trained

        if manager is None:
            raise ConfigError("a checkpoint of medrl", why="no plugin manager was given to build its network")
        model = load_trained(load_checkpoint(path, method="rl4seg3d"), manager)
    elif _is_torchscript(path):
        model = _of_package(path, config, device)
    else:
        model = _of_weights(path, config)
    plan = replace(
        model.plan,
        spacing_mm=config.spacing_mm or model.plan.spacing_mm,
        equalise=config.equalise or model.plan.equalise,
    )
    if isinstance(model.network, UNet3d):
        plan = replace(
            plan,
            multiple=max(plan.multiple, model.network.divisor[0], model.network.divisor[1]),
            least=2 * model.network.divisor[0],
        )
    rewards = dict(model.rewards)
    for name, file in config.reward_files:
        rewards[name] = _reward_of(file, name, config)
    if model.network is not None:
        model.network.to(device).eval().requires_grad_(requires_grad=False)
    return replace(model, plan=plan, rewards={name: reward.to(device) for name, reward in rewards.items()})


def _of_weights(path: Path, config: PredictConfig) -> Model:
    weights = read_weights(path, trust=config.trust)
    actor = weights.networks.get("actor")
    if actor is None:
        raise CheckpointError(
            f"{path} holds no actor",
            why=f"it holds {', '.join(weights.networks)}",
            do="name the file of the actor; reward nets: --reward anatomical=FILE",
        )
    names = dict(LABELS)
    if actor.out_channels != len(names):
        names = {"background": 0, **{f"label_{k}": k for k in range(1, actor.out_channels)}}
    rewards = {
        name: NetReward(network, weights.temperatures.get(f"reward_{name}", 1.0))
        for name, network in weights.rewards.items()
    }
    return Model(
        path=path,
        digest=weights.digest,
        network=actor,
        rewards=rewards,
        label_names=names,
        facts={
            "kind": weights.kind,
            "parameters": weights.counts(),
            "temperatures": dict(weights.temperatures),
        },
    )


def _of_package(path: Path, config: PredictConfig, device: torch.device) -> Model:
    scripted = load_scripted(path, device=device, trust=config.trust, view=config.view)
    if config.tto.mode != "off":
        raise ConfigError(
            f"--tto {config.tto.mode}",
            why="a TorchScript package gives labels and cannot be optimised",
            do="--tto off, or use a checkpoint",
        )
    return Model(
        path=path,
        digest=scripted.digest,
        network=None,
        scripted=scripted,
        # Packages are made for images that are not equalised, unless told otherwise.
        plan=Plan(equalise="off", least=64),
        facts={"kind": "torchscript", **scripted.facts},
    )


def _reward_of(file: Path, name: str, config: PredictConfig) -> NetReward:
    weights = read_weights(file, trust=config.trust, reward=name)
    found = weights.rewards
    network = found.get(name) or (next(iter(found.values())) if len(found) == 1 else None)
    if network is None:
        raise CheckpointError(
            f"{file} holds no reward net {name}", why=f"it holds {', '.join(weights.networks)}"
        )
    part = next(key for key, value in weights.networks.items() if value is network)
    return NetReward(network, weights.temperatures.get(part, 1.0))


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
