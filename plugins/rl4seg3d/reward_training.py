"""Training of the reward nets on pairs of window and mask with the truth beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medrl.core.adaptation import rewarding
from medrl.core.adaptation.fitting import Lesson, Plateau, adam, descend
from medrl.core.errors import ConfigError
from medrl.core.learned_reward import PairSet, draw
from medrl.core.rng import derive_seed

from . import landmark_training, parts
from .config import Net, Rl4seg3dConfig
from .domains import METHOD, Domains
from .landmark_training import LandmarkPairs
from .stages import course_of

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


def fit(rt: Runtime, cfg: Rl4seg3dConfig, data: Domains) -> None:
    """Train a reward net, new in each iteration (specification §6; findings 5).

    The anatomical net learns, from window and mask, the true class of each voxel, or with a binary head
    whether the label is right; the landmark net learns how far the ends of the mitral annulus are from where
    they should be. Both learn from the same pairs. A temperature makes the probabilities of a net come true
    on the pairs of subjects that it does not learn from; it is stored with the weights.
    """
    if not cfg.inputs.pairs:
        raise ConfigError(
            "inputs.pairs", why="no pairs are named", do="--set 'inputs.pairs=[RUN/stages/04_pairs_1]'"
        )
    name: Net = "landmark" if cfg.stage == "landmark" else "anatomical"
    plain = PairSet(cfg.inputs.pairs)
    landmark = LandmarkPairs(plain, cfg, data) if name == "landmark" else None
    pairs = plain if landmark is None else landmark
    own, held = rewarding.divided(plain)
    rewarding.check_pairs(plain, own, held, classes=data.classes, shape=(data.channels, *data.shape))
    net = parts.reward_net(cfg, rt.job.manager, name, channels=data.channels, classes=data.classes)
    parts.start_reward(cfg, name, net)
    rt.prepare(net)
    course = course_of(cfg.reward, cfg, len(own), rt.world_size)
    optimizer, plateau = adam(net, course), Plateau()
    rt.checkpoint.register(reward=net, optimizer=optimizer, plateau=plateau)
    rt.checkpoint.describe(**data.facts(), reward_net=name)
    seed = derive_seed(cfg.train.seed, METHOD, name, cfg.iteration)

    def validate() -> dict[str, float]:
        if landmark is None:
            return rewarding.validate(rt, net, plain, held)
        return landmark_training.validate(rt, net, landmark, held)

    def lesson(step: int) -> Lesson:
        net.train()
        chosen = draw(own, course.batch, seed=seed, step=step - 1, rank=rt.rank, world=rt.world_size)
        batch = pairs.batch(chosen).to(rt.device)
        with rt.autocast():
            loss = net.loss(*batch)
        return Lesson(loss, [plain.rows[number].id for number in chosen])

    descend(
        rt,
        course,
        optimizer,
        lesson,
        validate,
        best="val_loss",
        maximise=False,
        plateau=plateau,
    )
