"""Training of the reward net on pairs of image and mask with the truth beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from medrl.core.adaptation import rewarding
from medrl.core.adaptation.fitting import Lesson, Plateau, adam, descend
from medrl.core.errors import ConfigError
from medrl.core.learned_reward import PairSet, draw
from medrl.core.rng import derive_seed

from . import parts
from .config import Rl4segConfig
from .domains import Domains
from .stages import course_of

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


def fit(rt: Runtime, cfg: Rl4segConfig, data: Domains) -> None:
    """Train the reward net, new in each iteration (specification §8; findings 5).

    With the class head it learns, from image and mask, the true class of each pixel; with the binary head
    whether the label is right. A temperature makes its probabilities come true on the pairs of subjects that
    it does not learn from; it is stored with the weights.
    """
    if not cfg.inputs.pairs:
        raise ConfigError("inputs.pairs", why="no pairs are named", do="--pairs RUN/stages/04_pairs_1")
    pairs = PairSet(cfg.inputs.pairs)
    own, held = rewarding.divided(pairs)
    rewarding.check_pairs(pairs, own, held, classes=data.classes, shape=(data.channels, *data.shape))
    net = parts.reward_net(cfg, rt.job.manager, channels=data.channels, classes=data.classes)
    parts.start_reward(cfg, net)
    rt.prepare(net)
    course = course_of(cfg.reward, cfg, len(own), rt.world_size)
    optimizer, plateau = adam(net, course), Plateau()
    rt.checkpoint.register(reward=net, optimizer=optimizer, plateau=plateau)
    rt.checkpoint.describe(**data.facts())
    singles = rewarding.members(net)

    def lesson(step: int) -> Lesson:
        net.train()
        losses = []
        for number, single in enumerate(singles):
            seed = derive_seed(cfg.train.seed, "rl4seg", "reward", cfg.iteration, number)
            chosen = draw(own, course.batch, seed=seed, step=step - 1, rank=rt.rank, world=rt.world_size)
            batch = pairs.batch(chosen).to(rt.device)
            with rt.autocast():
                losses.append(single.loss(*batch))
        return Lesson(torch.stack(losses).mean(), [pairs.rows[number].id for number in chosen])

    descend(
        rt,
        course,
        optimizer,
        lesson,
        lambda: rewarding.validate(rt, net, pairs, held),
        best="val_loss",
        maximise=False,
        plateau=plateau,
    )
