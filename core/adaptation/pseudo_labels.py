"""Plausible predictions on target images, which PPO may take as actions that are known to be right."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medrl.core.errors import DataError
from medrl.core.volume.write import write_bytes

if TYPE_CHECKING:
    from .sets import Batch, ImageSet

FILE = "pseudo_labels.npz"


def write(folder: Path, masks: Mapping[str, Tensor]) -> None:
    """Write label maps ``(*S)`` by the id of their image; the same maps give the same bytes."""
    buffer = io.BytesIO()
    ids = sorted(masks)
    stack = np.stack([masks[name].numpy() for name in ids]) if ids else np.zeros((0, 1, 1), np.uint8)
    np.savez_compressed(buffer, ids=np.array(ids, dtype=np.str_), masks=stack)
    write_bytes(folder / FILE, buffer.getvalue(), suffix=".npz")


def read(folder: Path) -> dict[str, Tensor]:
    """Read what `write` wrote.

    Raises:
        DataError: The file is missing or damaged.
    """
    path = folder / FILE
    try:
        with np.load(path, allow_pickle=False) as found:
            return {
                str(name): torch.from_numpy(mask)
                for name, mask in zip(found["ids"], found["masks"], strict=True)
            }
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            str(path), why=f"cannot be read ({error})", do="make the pairs again with pairs.kind prediction"
        ) from error


class PseudoLabels:
    """The plausible predictions that belong to a set of images.

    Args:
        masks: Label maps by image id; empty for none.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)

    def of(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments `forced` and `forced_actions` of a rollout on a batch."""
        if not self.masks:
            return {}
        shape = tuple(batch.images.shape[2:])
        known = [name in self.masks for name in batch.ids]
        empty = torch.zeros(shape, dtype=torch.uint8)
        actions = torch.stack([self.masks.get(name, empty) for name in batch.ids])
        return {"forced": torch.tensor(known), "forced_actions": actions.long()}


def open_pseudo_labels(folders: Iterable[Path], images: ImageSet | None = None) -> PseudoLabels:
    """Read the plausible predictions of folders of pairs; later ones win.

    Args:
        folders: Of pairs from predictions.
        images: Only those of these images are kept.
    """
    found: dict[str, Tensor] = {}
    for folder in folders:
        found |= read(folder)
    if images is None:
        return PseudoLabels(found)
    wanted = set(images.ids)
    return PseudoLabels({name: mask for name, mask in found.items() if name in wanted})
