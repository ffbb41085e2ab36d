"""Correctors that are not trained: morphology, the most similar source mask, none."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medrl.core.errors import ConfigError

from ..encoding import one_hot
from .base import CorrectorModule, frames_of, from_frames

_CROSS = ndimage.generate_binary_structure(2, 1)


class NoCorrector(CorrectorModule):
    """Leaves label maps as they are."""

    @torch.no_grad()
    def correct(self, masks: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """Return ``(N, *S)`` unchanged, as int64."""
        del probabilities
        return masks.to(torch.int64)


class MorphologyCorrector(CorrectorModule):
    """Largest blobs and filled holes, frame by frame.

    1. Of each label, the highest first, keep the largest 4-connected blob.
    2. Fill the holes of each label, the highest first; a later label wins.
    3. Fill the holes of the union of labels 1 and 2 (of label 1 with two classes) with the higher of them.

    Args:
        classes: K.

    Source: specification §6.1.

    >>> mask = torch.tensor([[[2, 2, 2, 0], [2, 0, 2, 0], [2, 2, 2, 0], [0, 0, 0, 2]]])
    >>> MorphologyCorrector(3).correct(mask)[0].tolist()
    [[2, 2, 2, 0], [2, 2, 2, 0], [2, 2, 2, 0], [0, 0, 0, 0]]
    """

    @torch.no_grad()
    def correct(self, masks: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """Correct label maps ``(N, *S)``; int64."""
        del probabilities
        frames = frames_of(masks).cpu().numpy()
        fixed = np.stack([self._one(frame) for frame in frames]) if len(frames) else frames
        return from_frames(torch.from_numpy(fixed.astype(np.int64)), masks).to(masks.device)

    def _one(self, mask: NDArray[Any]) -> NDArray[Any]:
        labels = range(self.classes - 1, 0, -1)
        largest = np.zeros_like(mask)
        for label in labels:
            largest[_largest_blob(mask == label)] = label
        filled = np.zeros_like(mask)
        for label in labels:
            filled[ndimage.binary_fill_holes(largest == label)] = label
        filler = min(2, self.classes - 1)
        union = (filled == 1) | (filled == filler)
        filled[cast("NDArray[np.bool_]", ndimage.binary_fill_holes(union)) & ~union] = filler
        return filled


class AtlasCorrector(CorrectorModule):
    """The source mask with the best Dice, mean over the foreground classes that either mask has.

    Args:
        classes: K.
        masks: ``(M, *S)`` source masks. None waits for those of a state dict.

    A window whose third axis is time is looked up as a whole if the source masks are windows of the same
    length, else frame by frame. Another size in the plane is matched by nearest-pixel resizing.

    Source: specification §6.2.
    """

    masks: Tensor

    def __init__(self, classes: int, masks: Tensor | None = None) -> None:
        super().__init__(classes)
        kept = torch.zeros(0, 1, 1, dtype=torch.uint8) if masks is None else masks.to(torch.uint8).clone()
        self.register_buffer("masks", kept)

    @torch.no_grad()
    def correct(self, masks: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """Return the best source mask for each of ``(N, *S)``; int64.

        Raises:
            ConfigError: There are no source masks.
        """
        del probabilities
        if self.masks.shape[0] == 0:
            raise ConfigError("corrector 'atlas'", why="it has no source masks", do="build it with masks")
        together = self.masks.dim() == masks.dim() and self.masks.shape[3:] == masks.shape[3:]
        asked = masks if together else frames_of(masks)
        atlas = self.masks if together else frames_of(self.masks)
        atlas = _resized(atlas.to(masks.device), asked.shape[1:3])
        chosen = atlas[self._best(asked, atlas)].to(torch.int64)
        return chosen if together else from_frames(chosen, masks)

    def _best(self, asked: Tensor, atlas: Tensor) -> Tensor:
        """Index of the most similar atlas mask for each mask; the first of equals."""
        total = torch.zeros(asked.shape[0], atlas.shape[0], device=asked.device)
        present = torch.zeros_like(total)
        flat, known = asked.flatten(1), atlas.flatten(1)
        for label in range(1, self.classes):
            a, b = (flat == label).float(), (known == label).float()
            size = a.sum(dim=1)[:, None] + b.sum(dim=1)[None, :]
            total += torch.where(size > 0, 2.0 * (a @ b.T) / size.clamp_min(1.0), 0.0)
            present += size > 0
        return (total / present.clamp_min(1.0)).argmax(dim=1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Take over the atlas of a state dict, whatever its size."""
        given = state_dict.get(f"{prefix}masks")
        if isinstance(given, Tensor) and given.shape != self.masks.shape:
            self.masks = torch.empty_like(given, device=self.masks.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def dice_per_image(a: Tensor, b: Tensor, classes: int, *, only_highest: bool = False) -> Tensor:
    """Dice of label maps ``(N, *S)``, mean over the foreground classes that either has; ``(N,)`` float32.

    Two empty maps agree: 1.

    Args:
        a: Label maps.
        b: Label maps of the same shape.
        classes: K.
        only_highest: Look only at the highest label present in `a` (specification §5: a bug of the original).

    >>> dice_per_image(torch.tensor([[[1, 1, 2]]]), torch.tensor([[[1, 0, 2]]]), 3).tolist()
    [0.8333333730697632]
    """
    hot_a = one_hot(a, classes)[:, 1:].flatten(2)
    hot_b = one_hot(b, classes)[:, 1:].flatten(2)
    size = hot_a.sum(dim=2) + hot_b.sum(dim=2)
    dice = torch.where(size > 0, 2.0 * (hot_a * hot_b).sum(dim=2) / size.clamp_min(1.0), 0.0)
    present = (size > 0).float()
    if only_highest:
        own = hot_a.sum(dim=2) > 0
        rank = torch.arange(1, classes, device=a.device) * own
        highest = rank.argmax(dim=1)
        chosen = dice.gather(1, highest[:, None]).squeeze(1)
        return torch.where(own.any(dim=1), chosen, (present.sum(dim=1) == 0).float())
    count = present.sum(dim=1)
    return torch.where(count > 0, dice.sum(dim=1) / count.clamp_min(1.0), 1.0)


def _largest_blob(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Largest 4-connected component, the first of equals; an empty mask stays empty."""
    labels, count = ndimage.label(mask, structure=_CROSS)
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())[1:]
    return np.asarray(labels == 1 + int(sizes.argmax()), dtype=np.bool_)


def _resized(masks: Tensor, size: Any) -> Tensor:
    """Nearest-pixel resizing in the plane of ``(N, *S)``, centres on centres."""
    if tuple(masks.shape[1:3]) == tuple(size):
        return masks
    shape = (*size, *masks.shape[3:])
    return F.interpolate(masks[:, None].float(), size=shape, mode="nearest-exact")[:, 0].to(masks.dtype)
