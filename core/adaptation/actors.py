"""Policies and critics around any network that gives logits, and what the loop does to their weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from medrl.core.errors import ConfigError
from medrl.core.rl.pixelwise import (
    action_log_probs,
    binary_log_probs,
    categorical_log_probs,
    correlated_categorical,
    most_probable,
    pixel_entropy,
)

BnMode: TypeAlias = Literal["eval", "batch"]


class _Normalised(nn.Module):
    """A network whose batch normalisation keeps its statistics in training mode, or not.

    Args:
        network: Any network.
        bn_mode: ``eval``: training mode uses the stored statistics and never changes them; ``batch``:
            training mode normalises with the batch and follows it, as torch does.
    """

    def __init__(self, network: nn.Module, *, bn_mode: BnMode) -> None:
        super().__init__()
        if bn_mode not in ("eval", "batch"):
            raise ConfigError("bn_mode", why=f"unknown: {bn_mode!r}", do="eval or batch")
        self.network = network
        self.bn_mode: BnMode = bn_mode
        self._frozen = False
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; a frozen module stays as it is."""
        if self._frozen:
            return self
        super().train(mode)
        if self.bn_mode == "eval":
            for module in batch_norms(self.network):
                module.eval()
        return self

    def frozen(self) -> Self:
        """Return a copy that never changes: no gradients, and buffers that stay bit-identical in every mode.

        With ``bn_mode`` ``batch`` the copy normalises with the batch but does not follow it. Deviation: the
        original's reference follows.
        """
        twin = copy.deepcopy(self)
        twin.eval()
        if twin.bn_mode == "batch":
            for module in batch_norms(twin.network):
                module.train()
                module.track_running_stats = False
        twin.requires_grad_(requires_grad=False)
        twin._frozen = True
        return twin


class PixelActor(_Normalised, ABC):
    """A policy that chooses a label in every pixel; `log_probs` is all that subclasses add.

    Args:
        network: Gives logits ``(N, channels, *S)`` of images ``(N, C, *S)``: a tensor, or a sequence whose
            first is at full resolution, as the networks of other plugins do.
        bn_mode: See `_Normalised`; with ``eval`` the policy that acts and the policy that learns are the same
            function, so that ratios begin at exactly 1.

    Attributes:
        classes: K.
    """

    classes: int

    def __init__(self, network: nn.Module, *, bn_mode: BnMode = "eval") -> None:
        super().__init__(network, bn_mode=bn_mode)

    def logits(self, images: Tensor) -> Tensor:
        """The network's output ``(N, channels, *S)`` at full resolution."""
        return logits_of(self.network(images))

    @abstractmethod
    def log_probs(self, images: Tensor) -> Tensor:
        """Log-probabilities ``(N, K, *S)``, float32, of images ``(N, C, *S)``."""

    def forward(self, images: Tensor) -> Tensor:
        """The same as `log_probs`, for callers that want a module."""
        return self.log_probs(images)

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities ``(N, K, *S)``, float32."""
        return self.log_probs(images).exp()

    @torch.no_grad()
    def greedy(self, images: Tensor) -> Tensor:
        """The most probable labels ``(N, *S)``, int64; the first of equals."""
        return most_probable(self.log_probs(images))

    @torch.no_grad()
    def act(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        sigma_px: float | Sequence[float] = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Draw labels ``(N, *S)``, int64; give them with their log-probabilities ``(N, *S)``.

        Args:
            images: ``(N, C, *S)``.
            generator: Of the draws.
            sigma_px: Scale of the correlation between neighbours; see `correlated_categorical`.
        """
        log_probs = self.log_probs(images)
        actions = correlated_categorical(log_probs.exp(), sigma_px, generator)
        return actions, action_log_probs(log_probs, actions)

    def evaluate(self, images: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies ``(N, *S)`` of labels ``(N, *S)``, with a graph."""
        log_probs = self.log_probs(images)
        return action_log_probs(log_probs, actions), pixel_entropy(log_probs)


class CategoricalActor(PixelActor):
    """Softmax over K labels.

    Args:
        network: Gives K channels.
        classes: K.
        bn_mode: See `PixelActor`.
    """

    def __init__(self, network: nn.Module, *, classes: int, bn_mode: BnMode = "eval") -> None:
        super().__init__(network, bn_mode=bn_mode)
        if classes < 2:
            raise ConfigError(
                "categorical actor", why=f"{classes} classes", do="at least 2, background first"
            )
        self.classes = int(classes)

    def log_probs(self, images: Tensor) -> Tensor:
        """Log-probabilities ``(N, K, *S)``, float32.

        Raises:
            ConfigError: The network has another number of channels.
        """
        logits = self.logits(images)
        _check_channels(logits, self.classes, "categorical")
        return categorical_log_probs(logits)


class BinaryActor(PixelActor):
    """Sigmoid of one channel: background and foreground, K = 2."""

    classes = 2

    def log_probs(self, images: Tensor) -> Tensor:
        """Log-probabilities ``(N, 2, *S)``, float32.

        Raises:
            ConfigError: The network has more than one channel.
        """
        logits = self.logits(images)
        _check_channels(logits, 1, "binary")
        return binary_log_probs(logits)


class Critic(_Normalised):
    """The expected reward of an image: a sigmoid of a network with one output channel.

    The network gives ``(N, 1, *S)`` for a value in every pixel, or ``(N, 1)`` for one value of an image.

    Args:
        network: Such a network.
        bn_mode: ``batch`` by default: a critic begins untrained, when stored statistics mean nothing.
        deep: Where the network gives maps of falling resolution, give values at each; otherwise at the first
            alone.
    """

    def __init__(self, network: nn.Module, *, bn_mode: BnMode = "batch", deep: bool = False) -> None:
        super().__init__(network, bn_mode=bn_mode)
        self.deep = deep

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Values ``(N, *S)``, or ``(N, 1, …, 1)`` with as many dimensions, in [0, 1], float32.

        Raises:
            ConfigError: The network has more than one output channel.
        """
        found = self.network(images)
        scales = getattr(found, "logits", found)  # an output object has features beside its logits
        if self.deep and isinstance(scales, (list, tuple)):
            return [self._values(item, images) for item in scales]
        return self._values(found, images)

    @staticmethod
    def _values(output: Any, images: Tensor) -> Tensor:
        raw = logits_of(output)
        _check_channels(raw, 1, "critic")
        values = torch.sigmoid(raw.float())
        if values.ndim == 2:
            return values.view(-1, *(1,) * (images.ndim - 2))
        return values.squeeze(1)


def build_actor(
    network: nn.Module,
    *,
    classes: int,
    kind: Literal["categorical", "binary"] = "categorical",
    bn_mode: BnMode = "eval",
) -> PixelActor:
    """Make a policy of a network.

    Raises:
        ConfigError: The kind is unknown, or a binary policy is asked for more than two classes.
    """
    if kind == "categorical":
        return CategoricalActor(network, classes=classes, bn_mode=bn_mode)
    if kind != "binary":
        raise ConfigError("actor.kind", why=f"unknown: {kind!r}", do="categorical or binary")
    if classes != 2:
        raise ConfigError(
            "actor.kind",
            why=f"a binary actor cannot tell {classes} classes apart",
            do="actor.kind: categorical",
        )
    return BinaryActor(network, bn_mode=bn_mode)


def out_channels(kind: str, classes: int) -> int:
    """How many output channels the network of an actor needs."""
    return 1 if kind == "binary" else classes


def logits_of(result: Any) -> Tensor:
    """Read the output of any segmentation network: a tensor, or sequences of which the first comes first.

    Raises:
        ConfigError: There is no tensor at the first place.
    """
    found = result
    while isinstance(found, (list, tuple)) and found:
        found = found[0]
    if isinstance(found, Tensor):
        return found
    raise ConfigError(
        "model of the actor",
        why=f"its forward returned {type(result).__name__}, not logits",
        do="choose a segmentation model; `medrl methods` names them",
    )


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch normalisations of a module, those that synchronise ranks included."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


@torch.no_grad()
def shrink_and_perturb(
    module: nn.Module,
    *,
    factor: float = 0.5,
    std: float = 0.01,
    generator: torch.Generator | None = None,
) -> None:
    """Pull weights towards zero and add noise, in place: ``w ← factor · w + N(0, std²)``.

    Every parameter whose name contains ``weight`` is changed, gains of normalisations included; biases are
    not. The stored statistics of batch normalisations fit the new weights no longer: see `recalibrate`.

    Args:
        module: Actor or critic.
        factor: λ in [0, 1].
        std: Standard deviation of the noise; 0 is none.
        generator: CPU generator of the noise.

    Raises:
        ConfigError: A number is out of its range.

    Source: RL4Seg, auto_iteration.py; Ash and Adams 2020.
    """
    if not 0.0 <= factor <= 1.0 or std < 0.0:
        raise ConfigError(
            "shrink and perturb", why=f"factor {factor}, std {std}", do="factor in [0, 1], std at least 0"
        )
    for name, parameter in module.named_parameters():
        if "weight" not in name.rsplit(".", 1)[-1]:
            continue
        parameter.mul_(factor)
        if std > 0.0:
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.add_(noise.to(device=parameter.device, dtype=parameter.dtype))


def recalibrate(module: _Normalised, batches: Iterable[Tensor]) -> None:
    """Measure the statistics of all batch normalisations anew, as means over batches of images.

    Args:
        module: Actor or critic; its mode is the same afterwards.
        batches: Images ``(N, C, *S)`` on the device of the module; the same ones on every rank.
    """
    update_bn(batches, module.network)
    module.train(module.training)  # update_bn knows nothing of bn_mode


def _check_channels(logits: Tensor, expected: int, what: str) -> None:
    if logits.shape[1] != expected:
        raise ConfigError(
            f"network of the {what} policy" if what != "critic" else "network of the critic",
            why=f"it gives {logits.shape[1]} channels, {expected} are needed",
            do=f"out_channels: {expected}",
        )
