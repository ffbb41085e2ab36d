"""Correctors of windows and sequences: plausible in every frame, and from frame to frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError, RuntimeFault, did_you_mean
from medrl.core.learned_reward import build_corrector as build_core_corrector
from medrl.core.learned_reward import one_hot
from medrl.core.learned_reward.correctors import (
    CORRECTORS,
    CorrectorModule,
    Denoiser,
    MorphologyCorrector,
)
from medrl.core.learned_reward.corruption import (
    AFFINE,
    CORRUPTION,
    AffineRanges,
    CorruptionRanges,
)
from medrl.core.learned_reward.fields import from_params

from .perturb import glitch_frames

KINDS: tuple[str, ...] = ("temporal", *CORRECTORS)


class TemporalCorrector(CorrectorModule):
    """Morphology in each frame, the median over neighbouring frames, and morphology again.

    A voxel gets the label that most of the frames around it have (`temporal_median`). For one structure that
    is the median, which keeps an edge that moves steadily where it is and takes out what
    lasts for fewer than half of the frames. Beyond both ends, the first and the last frame are repeated.

    Args:
        classes: K.
        radius: Frames before and after that are looked at.
        passes: How often the median is taken.

    Raises:
        ConfigError: A negative radius or number of passes.

    Source: specification §11, in place of the original's pretrained autoencoder with temporal regularisation.
    """

    def __init__(self, classes: int, radius: int = 1, passes: int = 1) -> None:
        super().__init__(classes)
        if radius < 0 or passes < 0:
            raise ConfigError("corrector 'temporal'", why=f"radius {radius}, {passes} passes")
        self.radius = radius
        self.passes = passes
        self.morphology = MorphologyCorrector(classes)

    @torch.no_grad()
    def correct(self, masks: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """Correct windows or sequences ``(N, X, Y, T)``; single frames ``(N, X, Y)`` by morphology alone.

        Returns:
            int64 of the same shape.
        """
        del probabilities
        fixed = self.morphology.correct(masks)
        if masks.dim() != 4 or masks.shape[3] < 2 or self.radius == 0:
            return fixed
        for _ in range(self.passes):
            fixed = temporal_median(fixed, self.classes, self.radius)
        return self.morphology.correct(fixed)


class WindowDenoiser(Denoiser):
    """The denoiser of core for windows: single frames of its training windows are made wrong as well.

    Args:
        network: Maps ``(N, K, X, Y, T)`` of 0 and 1 to logits of the same shape.
        classes: K.
        jitter: Affine maps of whole source windows; None leaves them in place.
        corruption: What makes windows and frames wrong.
        glitch: Probability that a frame is made wrong on its own.

    Raises:
        ConfigError: `glitch` is no probability.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        *,
        jitter: AffineRanges | None = AFFINE,
        corruption: CorruptionRanges = CORRUPTION,
        glitch: float = 0.2,
    ) -> None:
        super().__init__(network, classes, jitter=jitter, corruption=corruption)
        if not 0.0 <= glitch <= 1.0:
            raise ConfigError("corrector 'denoiser'", why=f"glitch is {glitch}, expected a probability")
        self.glitch = glitch

    def batch(self, clean: Tensor, *, seed: int, keys: Sequence[object]) -> tuple[Tensor, Tensor]:
        """Make a training batch of ``(N, X, Y, T)`` source windows: corrupted, and what it was."""
        corrupted, moved = super().batch(clean, seed=seed, keys=keys)
        if clean.dim() == 4 and self.glitch > 0.0:
            corrupted = glitch_frames(
                corrupted, self.classes, seed=seed, keys=keys, share=self.glitch, ranges=self.corruption
            )
        return corrupted, moved


def temporal_median(masks: Tensor, classes: int, radius: int = 1) -> Tensor:
    """Return the label that most of ``2·radius + 1`` frames have.

    First the frames decide whether there is any structure, then which: where one structure gives way to the
    next while a frame is missing, no gap is left. The voxel's own label decides between equals.

    Args:
        masks: ``(N, X, Y, T)`` labels.
        classes: K.
        radius: Frames before and after.

    Returns:
        ``(N, X, Y, T)`` int64.

    Raises:
        RuntimeFault: The masks have other than four axes.
    """
    if masks.dim() != 4:
        raise RuntimeFault("temporal median", why=f"masks {tuple(masks.shape)}, expected (N, X, Y, T)")
    hot = one_hot(masks, classes)
    flat = hot.reshape(-1, 1, masks.shape[3])
    padded = F.pad(flat, (radius, radius), mode="replicate")
    votes = F.avg_pool1d(padded, 2 * radius + 1, stride=1).view(hot.shape) * (2 * radius + 1)
    votes = votes.round()
    inside = votes[:, 1:].sum(dim=1) > votes[:, 0]
    label = 1 + (votes[:, 1:] + 0.5 * hot[:, 1:]).argmax(dim=1)
    return torch.where(inside, label, 0)


def build_corrector(
    kind: str,
    *,
    classes: int,
    network: nn.Module | None = None,
    masks: Tensor | None = None,
    shape: Sequence[int] | None = None,
    **params: Any,
) -> CorrectorModule:
    """Build a corrector of windows by name.

    Args:
        kind: ``temporal`` (morphology and median over time), or one of core's: ``denoiser`` (with wrong
            frames), ``vae``, ``morphology``, ``atlas``, ``none``.
        classes: K.
        network: Of the denoiser.
        masks: Of the atlas.
        shape: Of the VAE.
        params: Further settings of that kind.

    Raises:
        ConfigError: Unknown kind or setting, or something that it needs is missing.
    """
    what = f"corrector '{kind}'"
    if kind == "temporal":
        unknown = [f"{name}: {did_you_mean(name, ('radius', 'passes'))}" for name in params
                   if name not in ("radius", "passes")]  # fmt: skip
        if unknown:
            raise ConfigError(what, why="unknown settings", problems=unknown)
        return TemporalCorrector(classes, **params)
    if kind == "denoiser" and network is not None:
        known = ("jitter", "corruption", "glitch")
        unknown = [f"{name}: {did_you_mean(name, known)}" for name in params if name not in known]
        if unknown:
            raise ConfigError(what, why="unknown settings", problems=unknown)
        for name, ranges in (("jitter", AffineRanges), ("corruption", CorruptionRanges)):
            if isinstance(params.get(name), Mapping):
                params[name] = from_params(ranges, params[name], f"{what}, {name}")
        return WindowDenoiser(network, classes, **params)
    if kind not in KINDS:
        raise ConfigError(what, why=did_you_mean(kind, KINDS))
    return build_core_corrector(kind, classes=classes, network=network, masks=masks, shape=shape, **params)
