"""What is measured while training, on images that training does not learn from; and the alarms."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medrl.core.learned_reward.correctors import dice_per_image
from medrl.core.rl.pixelwise import RewardFn, correlated_categorical

from .actors import PixelActor
from .sets import ImageSet

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

_BATCH = 16
_RISE, _FALL = 0.01, 0.05
_log = logging.getLogger("medrl.adaptation")

ALARMS = ("low_start_validity", "hacking")

RewardOf = Callable[[Sequence[int]], RewardFn]
"""Gives the reward function of the images with these numbers."""

Valid = Callable[[Tensor], bool]
"""Whether a label map ``(*S)`` is plausible."""


@torch.no_grad()
def supervised(
    rt: Runtime,
    actor: PixelActor,
    source: ImageSet | None,
    target: ImageSet | None,
    valid: Valid,
) -> dict[str, float]:
    """Dice on source validation images, and the share of valid masks on both domains.

    Target images are looked at without labels. The result is the same with any number of ranks.
    """
    found: dict[str, float] = {}
    actor.eval()
    if source is not None and source.labels is not None:
        rows: dict[str, tuple[float, float]] = {}
        for numbers in _own(rt, source):
            masks = _greedy(rt, actor, source.images[numbers])
            dice = dice_per_image(masks, torch.as_tensor(source.labels)[numbers], source.classes)
            for number, value, mask in zip(numbers, dice.tolist(), masks, strict=True):
                rows[source.ids[number]] = (value, float(valid(mask)))
        found["val_dice"], found["val_validity"] = _means(rt.gather(rows))
    if target is not None:
        verdicts: dict[str, tuple[float]] = {}
        for numbers in _own(rt, target):
            masks = _greedy(rt, actor, target.images[numbers])
            for number, mask in zip(numbers, masks, strict=True):
                verdicts[target.ids[number]] = (float(valid(mask)),)
        (found["val_target_validity"],) = _means(rt.gather(verdicts))
    actor.train()
    return found


@torch.no_grad()
def policy(
    rt: Runtime,
    actor: PixelActor,
    reward: RewardOf,
    images: ImageSet,
    valid: Valid,
    *,
    sigma_px: float | Sequence[float],
    stream: Callable[[str], torch.Generator],
) -> dict[str, float]:
    """Reward of sampled and of greedy label maps, share of valid greedy ones, share of foreground.

    No label is looked at. Every image has a random stream of its own, the same at each validation, so that
    neither the number of ranks nor chance decides between two steps.

    Args:
        rt: The runtime.
        actor: The policy; in training mode afterwards.
        reward: Gives the reward function of images.
        images: What it acts on.
        valid: Whether a label map is plausible.
        sigma_px: Of the sampling; see `correlated_categorical`.
        stream: The random stream of an image, by its id.
    """
    rows: dict[str, tuple[float, ...]] = {}
    actor.eval()
    for numbers in _own(rt, images):
        seen = images.images[numbers].to(rt.device, torch.float32)
        with rt.autocast():
            log_probs = actor.log_probs(seen)
        greedy = log_probs.argmax(dim=1)
        sampled = torch.cat(
            [
                correlated_categorical(probability[None], sigma_px, stream(images.ids[number]))
                for number, probability in zip(numbers, log_probs.exp(), strict=True)
            ]
        )
        judge = reward(numbers)
        with rt.autocast():
            earned = [
                judge(masks, seen).float().flatten(1).mean(dim=1).tolist() for masks in (sampled, greedy)
            ]
        for at, number in enumerate(numbers):
            mask = greedy[at].cpu()
            rows[images.ids[number]] = (
                earned[0][at],
                earned[1][at],
                float(valid(mask)),
                float((mask != 0).float().mean()),
            )
    actor.train()
    names = ("val_reward", "val_reward_greedy", "val_validity", "val_foreground")
    return dict(zip(names, _means(rt.gather(rows)), strict=True))


class Watch:
    """Compares what is measured with the beginning and warns, once each.

    Args:
        least: Share of valid masks below which the start is poor.
        help: What to do about that, before what always helps; ends with a comma and a space, or is empty.
        speaks: Whether warnings are said, or only logged as numbers.

    Attributes:
        start: What was measured before the first update.
        alarms: Names of the alarms so far.
    """

    def __init__(self, least: float, *, help: str = "", speaks: bool = True) -> None:
        self.least, self.help, self.speaks = least, help, speaks
        self.start: dict[str, float] = {}
        self.alarms: list[str] = []

    def begin(self, found: Mapping[str, float]) -> dict[str, float]:
        """Keep what the actor can do before the first update; return it for the log."""
        self.start = dict(found)
        if found["val_validity"] < self.least:
            self._warn(
                "low_start_validity",
                f"only {found['val_validity']:.0%} of the masks on target images are valid at the start: "
                f"little can be learned from pairs of such an actor; {self.help}train the source and style "
                "actors longer, or check sample.* and rules",
            )
        shown = ("reward", "validity")
        return {f"start_{name}": found[f"val_{name}"] for name in shown} | self.facts()

    def look(self, found: Mapping[str, float]) -> dict[str, float]:
        """Compare with the start; return the alarms for the log."""
        gained = found["val_reward_greedy"] - self.start.get("val_reward_greedy", math.nan)
        lost = self.start.get("val_validity", math.nan) - found["val_validity"]
        if gained > _RISE and lost > _FALL:
            self._warn(
                "hacking",
                f"the reward rose by {gained:.3f} while the share of valid masks fell by {lost:.0%}: the "
                "policy exploits errors of the reward. Take an earlier checkpoint, raise ppo.kl, train "
                "several reward nets (reward.nets 3), or give the corrector more weight",
            )
        return self.facts()

    def facts(self) -> dict[str, float]:
        """Return 1 for each alarm that was raised, 0 for the others."""
        return {f"alarm_{name}": float(name in self.alarms) for name in ALARMS}

    def state_dict(self) -> dict[str, Any]:
        """Return the start and the alarms."""
        return {"start": dict(self.start), "alarms": list(self.alarms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.start, self.alarms = dict(state["start"]), list(state["alarms"])

    def _warn(self, name: str, text: str) -> None:
        if name not in self.alarms:
            self.alarms.append(name)
            if self.speaks:
                _log.warning("%s", text)


def _greedy(rt: Runtime, actor: PixelActor, images: Tensor) -> Tensor:
    with rt.autocast():
        return actor.greedy(images.to(rt.device, torch.float32)).cpu()


def _own(rt: Runtime, images: ImageSet) -> Iterator[list[int]]:
    """Numbers of this rank's images, some at a time."""
    own = list(range(rt.rank, len(images.ids), rt.world_size))
    for start in range(0, len(own), _BATCH):
        yield own[start : start + _BATCH]


def _means(rows: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
    values = list(rows.values())
    return tuple(sum(column) / len(values) for column in zip(*values, strict=True))
