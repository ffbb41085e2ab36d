"""What a corrector does to corrupted masks whose truth is known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medrl.core.errors import DataError
from medrl.core.learned_reward import CorrectorModule, corrupt_masks
from medrl.core.learned_reward.correctors import dice_per_image

from .sets import ImageSet

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

_log = logging.getLogger("medrl.adaptation")
_HELD = 64
"""Validation masks that are corrupted and corrected."""
ENOUGH = 0.8
"""Share of valid masks below which a corrector is warned of."""


@torch.no_grad()
def validate(
    rt: Runtime, made: CorrectorModule, images: ImageSet, valid: Callable[[Tensor], bool], classes: int
) -> dict[str, float]:
    """Dice of corrected with true masks, and the share of valid ones, before and after.

    Every rank looks at the same masks, which are corrupted in the same way each time.

    Args:
        rt: The runtime.
        made: The corrector; in training mode afterwards.
        images: Whose labels are the true masks.
        valid: Whether a mask ``(*S)`` is plausible.
        classes: K.

    Raises:
        DataError: There are no labels.
    """
    if images.labels is None:
        raise DataError("corrector", why="the source images have no labels")
    truth = torch.as_tensor(images.labels[:_HELD]).long().to(rt.device)
    broken = corrupt_masks(truth, classes, seed=0, keys=list(images.ids[:_HELD]))
    fixed = made.correct(broken)
    made.train()
    return {
        "val_dice": float(dice_per_image(fixed, truth, classes).mean()),
        "corrupted_dice": float(dice_per_image(broken, truth, classes).mean()),
        "val_validity": sum(valid(mask) for mask in fixed.cpu()) / len(fixed),
        "corrupted_validity": sum(valid(mask) for mask in broken.cpu()) / len(broken),
    }


def warn_if_harmful(found: Mapping[str, float]) -> None:
    """Warn of a corrector that makes masks worse, or that leaves many implausible."""
    if found["val_dice"] < found["corrupted_dice"]:
        _log.warning(
            "the corrector makes corrupted masks worse (Dice %.3f, before it %.3f): train it longer "
            "(corrector.steps), or its reward will mislead",
            found["val_dice"],
            found["corrupted_dice"],
        )
    elif found["val_validity"] < ENOUGH:
        _log.warning(
            "only %.0f %% of the corrected masks keep the rules: train the corrector longer "
            "(corrector.steps), or a policy that trusts it will not keep them either",
            100.0 * found["val_validity"],
        )
