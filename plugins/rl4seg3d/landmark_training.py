"""What the landmark reward net learns from: the pairs of the other net, many with their base moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.adaptation.rewarding import batches
from medrl.core.errors import ConfigError
from medrl.core.learned_reward import PairBatch, PairSet, RewardNet
from medrl.core.rng import numpy_generator

from .config import Rl4seg3dConfig
from .domains import METHOD, Domains
from .landmark_targets import landmark_targets
from .perturb import move_base

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

_MOVES_MM = (4.0, 16.0)
"""How far a base is moved, either way."""


class LandmarkPairs:
    """Pairs whose truth is the target of the landmark net, in [0, 1].

    Args:
        pairs: Windows, masks and true labels.
        cfg: The config.
        data: Knows the size of a pixel and the labels.

    Raises:
        ConfigError: The data have no label of the cavity or of the wall.
    """

    def __init__(self, pairs: PairSet, cfg: Rl4seg3dConfig, data: Domains) -> None:
        self.pairs, self.cfg = pairs, cfg
        self.spacing = [float(step) for step in data.facts()["spacing"]]
        values = {name.lower(): value for name, value in data.label_names.items()}
        if not {"lv", "myo"} <= set(values):
            raise ConfigError(
                "reward.nets landmark",
                why=f"labels LV and MYO are needed, there are {', '.join(data.label_names)}",
                do="--set 'reward.nets=[anatomical]'",
            )
        self.labels = {"lv": values["lv"], "myo": values["myo"]}

    def batch(self, numbers: Sequence[int] | NDArray[np.int64]) -> PairBatch:
        """Read pairs by their numbers; what is moved depends on the number alone."""
        images, actions, truths = self.pairs.batch(numbers)
        moved, shifts, tilts = [], [], []
        for row, number in enumerate(numbers):
            draw = numpy_generator(self.cfg.train.seed, METHOD, "moved base", int(number))
            if draw.random() < self.cfg.reward.base_moves:
                moved.append(row)
                way = -1.0 if draw.random() < 0.5 else 1.0
                shifts.append(way * float(draw.uniform(*_MOVES_MM)) / self.spacing[1])
                tilts.append(float(draw.uniform(-1.0, 1.0)))
        if moved:
            actions[moved] = move_base(truths[moved], shifts, tilts)
        targets = landmark_targets(
            actions, truths, self.spacing, limit_mm=self.cfg.reward.landmark_mm, **self.labels
        )
        return PairBatch(images, actions, targets)


def validate(rt: Runtime, net: RewardNet, pairs: LandmarkPairs, held: NDArray[np.int64]) -> dict[str, float]:
    """Fit the temperature on pairs of held-out subjects, and compare reward with target, on all ranks alike.

    `val_error` is the mean distance of the reward from its target where the target is below one half, so
    where a landmark is wrong; `val_loss` is what training makes small, without the temperature.
    """
    temperature = net.calibrate(batches(rt, pairs, held))
    losses, errors, wrong, rewards = 0.0, 0.0, 0, 0.0
    net.eval()
    for batch in batches(rt, pairs, held):
        with torch.no_grad(), rt.autocast():
            losses += len(batch.images) * float(net.loss(*batch))
            found = net.reward(batch.actions, batch.images).float()
        doubtful = batch.truths < 0.5
        errors += float((found - batch.truths).abs()[doubtful].sum())
        wrong += int(doubtful.sum())
        rewards += float(found.mean()) * len(batch.images)
    net.train()
    return {
        "val_loss": losses / len(held),
        "val_reward": rewards / len(held),
        **({"val_error": errors / wrong} if wrong else {}),
        "temperature": sum(temperature) / len(temperature),
    }
