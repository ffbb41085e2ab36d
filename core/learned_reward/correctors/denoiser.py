"""A network that turns corrupted label maps into plausible ones; it never sees an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError

from ..corruption import AFFINE, CORRUPTION, AffineRanges, CorruptionRanges, corrupt_masks, jitter_masks
from ..encoding import cross_entropy, one_hot
from ..modes import evaluating, logits_of
from .base import CorrectorModule, frames_of, from_frames


class Denoiser(CorrectorModule):
    """A network K → K on one-hot label maps, trained on corrupted source masks.

    Args:
        network: Maps ``(N, K, *S)`` of 0 and 1 to logits ``(N, K, *S)``. If it has no three-dimensional
            convolution, windows ``(N, X, Y, T)`` go through it frame by frame.
        classes: K.
        jitter: Affine maps of the source masks; None leaves them in place.
        corruption: What makes them wrong.

    Source: findings step 3.
    """

    learned: ClassVar[bool] = True

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        *,
        jitter: AffineRanges | None = AFFINE,
        corruption: CorruptionRanges = CORRUPTION,
    ) -> None:
        super().__init__(classes)
        self.network = network
        self.jitter = jitter
        self.corruption = corruption
        self._volumetric = any(isinstance(part, nn.Conv3d) for part in network.modules())

    def forward(self, masks: Tensor) -> Tensor:
        """Logits ``(N, K, *S)`` of label maps ``(N, *S)``."""
        asked = masks if self._volumetric else frames_of(masks)
        logits = logits_of(self.network(one_hot(asked, self.classes)))
        if logits.shape != (asked.shape[0], self.classes, *asked.shape[1:]):
            raise ConfigError(
                "corrector 'denoiser'",
                why=f"expected logits {(asked.shape[0], self.classes, *asked.shape[1:])}, "
                f"got {tuple(logits.shape)}",
            )
        return logits if self._volumetric else from_frames(logits, masks)

    @torch.no_grad()
    def probabilities(self, masks: Tensor) -> Tensor:
        """Probability of each class ``(N, K, *S)``, in evaluation mode whatever the mode is."""
        with evaluating(self):
            return torch.softmax(self(masks), dim=1)

    def batch(self, clean: Tensor, *, seed: int, keys: Sequence[object]) -> tuple[Tensor, Tensor]:
        """Make a training batch of ``(N, *S)`` source masks: corrupted, and what it was."""
        moved = clean
        if self.jitter is not None:
            moved = jitter_masks(clean, seed=seed, keys=keys, ranges=self.jitter)
        return corrupt_masks(moved, self.classes, seed=seed, keys=keys, ranges=self.corruption), moved

    def loss(self, clean: Tensor, *, seed: int, keys: Sequence[object]) -> dict[str, Tensor]:
        """Cross-entropy of the restored to the true label map; see `LearnedCorrector`."""
        corrupted, moved = self.batch(clean, seed=seed, keys=keys)
        loss = cross_entropy(self(corrupted), moved)
        return {"loss": loss}
