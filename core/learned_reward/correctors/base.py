"""What all correctors share: label maps in, plausible label maps out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError, RuntimeFault

from ..encoding import one_hot


@runtime_checkable
class Corrector(Protocol):
    """Makes label maps plausible.

    Attributes:
        classes: K.
        learned: Whether it is trained; it then is a `LearnedCorrector`.
    """

    classes: int
    learned: ClassVar[bool]

    def correct(self, masks: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """Correct label maps ``(N, *S)``; int64, without a graph, on the same device.

        Args:
            masks: Labels in [0, K).
            probabilities: ``(N, K, *S)`` of the policy, for correctors that weigh them; those of medrl look
                at the label map alone.
        """
        ...

    def probabilities(self, masks: Tensor) -> Tensor:
        """Probability of each class ``(N, K, *S)``, float32, after correction of ``(N, *S)``."""
        ...


class LearnedCorrector(Corrector, Protocol):
    """A corrector with weights, trained on source masks."""

    def loss(self, clean: Tensor, *, seed: int, keys: Sequence[object]) -> dict[str, Tensor]:
        """Loss of one batch of true label maps.

        Args:
            clean: ``(N, *S)``.
            seed: Of corruption, augmentation and latent noise.
            keys: N names that with the seed decide these draws, such as (step, case).

        Returns:
            ``loss`` to go back through, and its parts for the log, all scalars.
        """
        ...


class CorrectorModule(nn.Module):
    """Base of the correctors: a module, so that `state_dict` and `to` work for all of them."""

    learned: ClassVar[bool] = False

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ConfigError("corrector", why=f"{classes} classes; background and one structure at least")
        self.classes = classes

    @torch.no_grad()
    def correct(self, masks: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """Correct label maps ``(N, *S)``; int64."""
        del probabilities
        return self.probabilities(masks).argmax(dim=1)

    def probabilities(self, masks: Tensor) -> Tensor:
        """Probability of each class ``(N, K, *S)`` after correction: 0 and 1 here."""
        return one_hot(self.correct(masks), self.classes)


def frames_of(masks: Tensor) -> Tensor:
    """Frames of label maps as label maps of their own: ``(N, X, Y, T)`` → ``(N·T, X, Y)``; 2D stays."""
    if masks.dim() == 3:
        return masks
    if masks.dim() == 4:
        return masks.movedim(-1, 1).reshape(-1, *masks.shape[1:3])
    raise RuntimeFault("corrector", why=f"label maps have shape {tuple(masks.shape)}, expected (N, *S)")


def from_frames(frames: Tensor, masks: Tensor) -> Tensor:
    """Undo `frames_of` on ``(N·T, ..., X, Y)``, with the axes between moved along."""
    if masks.dim() == 3:
        return frames
    split = frames.reshape(masks.shape[0], masks.shape[3], *frames.shape[1:])
    return split.movedim(1, -1)
