"""Training of the reward net on pairs of image and mask with the truth beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.errors import ConfigError, DataError
from medrl.core.learned_reward import PairBatch, PairSet, RewardNet, draw, held_out_quality
from medrl.core.rng import derive_seed

from . import parts, schedules
from .config import Rl4segConfig
from .domains import Domains
from .stages import batch_of, interval_of, rate_of, steps_of

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

_BATCH = 16
_HELD = 512
"""Validation pairs that are looked at."""


def fit(rt: Runtime, cfg: Rl4segConfig, data: Domains) -> None:
    """Train the reward net, new in each iteration (specification §8; findings 5).

    With the class head it learns, from image and mask, the true class of each pixel; with the binary head
    whether the label is right. A temperature makes its probabilities come true on the pairs of subjects that
    it does not learn from; it is stored with the weights.
    """
    if not cfg.inputs.pairs:
        raise ConfigError("inputs.pairs", why="no pairs are named", do="--pairs RUN/stages/04_pairs_1")
    pairs = PairSet(cfg.inputs.pairs)
    own, held = pairs.numbers("train"), pairs.numbers("val")[:: _thinning(len(pairs.numbers("val")))]
    check_pairs(pairs, own, held, data)
    net = parts.reward_net(cfg, rt.job.manager, channels=data.channels, classes=data.classes)
    parts.start_reward(cfg, net)
    rt.prepare(net)
    stage = cfg.reward
    top = rate_of(stage, cfg)
    optimizer = torch.optim.Adam(net.parameters(), lr=top, weight_decay=stage.weight_decay)
    plateau = Plateau()
    rt.checkpoint.register(reward=net, optimizer=optimizer, plateau=plateau)
    rt.checkpoint.describe(**data.facts())

    singles = [
        RewardNet([network], classes=net.classes, head=net.head, encoding=net.encoding)
        for network in net.networks
    ]
    size = batch_of(stage, cfg)
    steps = steps_of(stage, cfg, len(own), rt.world_size)
    every = interval_of(stage, cfg, steps)
    for step in rt.steps(rt.checkpoint.resume(), steps):
        part = (
            plateau.factor if stage.schedule == "plateau" else schedules.factor(stage.schedule, step, steps)
        )
        rate = schedules.set_rate(optimizer, top * part)
        net.train()
        losses = []
        for number, single in enumerate(singles):
            seed = derive_seed(cfg.train.seed, "rl4seg", "reward", cfg.iteration, number)
            chosen = draw(own, size, seed=seed, step=step - 1, rank=rt.rank, world=rt.world_size)
            batch = pairs.batch(chosen).to(rt.device)
            with rt.autocast():
                losses.append(single.loss(*batch))
        loss = torch.stack(losses).mean()
        rt.backward(loss, cases=[pairs.rows[number].id for number in chosen])
        done = rt.step(optimizer, clip_norm=stage.clip_norm)
        rt.log(step, loss=loss.detach(), lr=rate, grad_norm=done.grad_norm)

        if step % every == 0 or step == rt.total_steps:
            found = validate(rt, net, pairs, held)
            rt.log(step, **found)
            plateau.look(found["val_loss"])
            rt.best(step, found["val_loss"], maximise=False, name="val_loss")


def validate(rt: Runtime, net: RewardNet, pairs: PairSet, held: NDArray[np.int64]) -> dict[str, float]:
    """Fit the temperature on pairs of held-out subjects, and measure the reward on them.

    AUROC (of finding wrong pixels), calibration error, binary cross-entropy and mean reward are those near
    the foreground of the mask; `val_loss` is what training makes small, without the temperature. All ranks do
    the same.
    """
    temperature = net.calibrate(_batches(rt, pairs, held))
    quality = held_out_quality(net.reward, _batches(rt, pairs, held))
    losses: list[tuple[int, float]] = []
    net.eval()
    for batch in _batches(rt, pairs, held):
        with torch.no_grad(), rt.autocast():
            losses.append((len(batch.images), float(net.loss(*batch))))
    net.train()
    near = quality["near"]
    found = {"auroc": near.auroc, "ece": near.ece, "bce": near.bce, "reward": near.reward}
    return {
        "val_loss": sum(count * value for count, value in losses) / len(held),
        **{f"val_{name}": value for name, value in found.items() if value == value},
        "temperature": sum(temperature) / len(temperature),
    }


class Plateau:
    """A tenth of the rate after ten validations without progress.

    Source: specification §8 (ReduceLROnPlateau of torch with its defaults).
    """

    def __init__(self, patience: int = 10, by: float = 0.1) -> None:
        self.patience, self.by = patience, by
        self.factor, self.best, self.waited = 1.0, float("inf"), 0

    def look(self, loss: float) -> None:
        """Take note of a validation loss."""
        if loss < self.best * (1.0 - 1e-4):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.factor, self.waited = self.factor * self.by, 0

    def state_dict(self) -> dict[str, Any]:
        """Return factor, best loss and validations since."""
        return {"factor": self.factor, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.factor, self.best, self.waited = state["factor"], state["best"], state["waited"]


def check_pairs(pairs: PairSet, own: NDArray[np.int64], held: NDArray[np.int64], data: Domains) -> None:
    """Refuse pairs that cannot be learned from.

    Raises:
        DataError: There are too few, or they are of other images.
    """
    if len(own) == 0 or len(held) == 0:
        raise DataError(
            "pairs",
            why=f"{len(own)} for training, {len(held)} for validation",
            do="more images (pairs.images), a larger pairs.validation, a better actor (--start style), or "
            "--pairs synthetic",
        )
    if pairs.classes != data.classes or pairs.shape != (data.channels, *data.shape):
        raise DataError(
            "pairs",
            why=f"{pairs.classes} classes of {list(pairs.shape)}, the data have {data.classes} of "
            f"{[data.channels, *data.shape]}",
        )


def _thinning(count: int) -> int:
    return max(1, -(-count // _HELD))


def _batches(rt: Runtime, pairs: PairSet, numbers: NDArray[np.int64]) -> Iterator[PairBatch]:
    for start in range(0, len(numbers), _BATCH):
        yield pairs.batch(numbers[start : start + _BATCH]).to(rt.device)
