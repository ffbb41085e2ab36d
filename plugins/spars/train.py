"""Self-play: two windows compete for what the classifier has learned to see; the learner is the first one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medrl.core import rng
from medrl.core.rl.ppo import PPOConfig, ppo_update
from medrl.core.rl.rollout import RolloutBuffer

from .agent import HuntAgent, Sighted, build_agent
from .config import SparsConfig
from .env import HuntEnv
from .observer import Observer
from .opponents import DUMMY, LIVE, Opponents
from .painting import visit_count
from .policies import Episodes, SelfPlay, run
from .rewards import build_reward
from .table import ScoreTable
from .warmstart import Teacher, agreement, imitation_loss, walk_with

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


@dataclass(frozen=True, eq=False, kw_only=True)
class PlayData:
    """Scores of the volumes to learn on, and of those that learning is watched on."""

    train: ScoreTable
    val: ScoreTable | None = None


def fit(rt: Runtime, cfg: SparsConfig, data: PlayData) -> None:
    """Learn where to move a window by playing against copies of oneself (specification §4 to §6).

    State s: the window's surroundings, its place, the way to the other window, where somebody was. Action a:
    one step along an axis. Both windows move, then the frozen classifier scores both; reward
    r = sign(p₁ - p₂) or what the config says. Warm start: imitate a teacher who knows the scores,

        L = -Σ_a q(a|s) log π(a|s) - β H(π),   q: the teacher's best moves.

    Then, in every update, play T steps in E games against frozen copies, and improve by PPO,

        L = -mean min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) + c_v mean (V - R)² - c_H mean H,   A by GAE,

    with the value of what is left behind at truncation, and none at termination. Every so many steps the
    opponent becomes a new copy. Scores are looked up in tables and are no part of what a policy sees.
    """
    game = Game.build(rt, cfg, data)
    warm, tuned = optimizers(cfg, game.agent)
    rt.checkpoint.register(
        agent=game.agent, warm_optimizer=warm, optimizer=tuned, env=game.env, opponents=game.opponents
    )
    rt.checkpoint.describe(**game.facts(cfg))
    done = rt.checkpoint.resume()
    first = 0 if cfg.warm.kind == "none" else cfg.warm.steps
    if done == 0:
        game.start("warm" if first else "games")
    total = first + cfg.ppo.updates
    total = min(total, cfg.train.max_steps) if cfg.train.max_steps else total
    every = cfg.train.validate_every or max(1, total // 5)
    for step in rt.steps(done, total):
        if step <= first:
            facts = imitate(rt, cfg, game, warm, step)
            rt.log(step, phase="warm", **facts)
            if step == first:
                game.start("games")
        else:
            rate = set_rate(tuned, cfg.ppo.lr * factor(cfg, step - first))
            facts = improve(rt, cfg, game, tuned, step, step - first)
            rt.log(step, phase="ppo", lr=rate, **facts)
        if step % every == 0 or step in (first, rt.total_steps):
            found = validate(rt, cfg, game)
            rt.log(step, **found)
            if found:
                rt.best(step, found["val_score"], name="val_score")
    game.flush()


class Game:
    """Everything that self-play needs: tables, environment, learner, opponents.

    Attributes:
        data: Scores.
        agent: The learner.
        policy: The learner with the observer of the training volumes.
        held: Observer of the validation volumes.
        env: Games of this rank, on the volumes of this rank.
        opponents: Of the learner.
        teacher: Of the warm start; None without one.
    """

    def __init__(
        self,
        data: PlayData,
        agent: HuntAgent,
        observer: Observer,
        env: HuntEnv,
        opponents: Opponents,
        teacher: Teacher | None,
        seed: int,
    ) -> None:
        self.data, self.agent, self.observer, self.env = data, agent, observer, env
        self.opponents, self.teacher, self.seed = opponents, teacher, seed
        self.policy = Sighted(agent, observer)
        sizes = {"view_size": observer.view_size, "window_size": observer.window_size}
        self.held = None if data.val is None else Observer.of(data.val, **sizes)

    @classmethod
    def build(cls, rt: Runtime, cfg: SparsConfig, data: PlayData) -> Game:
        """Build all of it with new weights, on the device of the run.

        Raises:
            ConfigError: Settings do not fit each other or the scorer.
        """
        table, env, settings = data.train, cfg.env, cfg.opponents
        sizes = {name: cfg.agent.params.get(name) for name in ("view_size", "window_size")}
        observer = Observer.of(table, **{name: value for name, value in sizes.items() if value is not None})
        own = share(len(table), rt.rank, rt.world_size)
        with rng.isolated(rng.derive_seed(cfg.train.seed, "spars", "agent")):
            agent = build_agent(cfg.agent, rt.job.manager, observer)
        agent.fit_scales(observer, own)
        agent = rt.prepare(agent)
        weights = torch.zeros(len(table))
        weights[own] = 1.0
        games = HuntEnv(
            table,
            build_reward(env, rt.job.manager, dense=table.scorer.has_dense),
            num_envs=cfg.ppo.envs,
            start=env.start,
            bounds=env.bounds,
            tau=env.tau,
            horizon=env.horizon,
            writers=env.writers,
            painting="original" if env.original_painting else "own",
            observer=observer,
            weights=weights,
            first=rt.rank * cfg.ppo.envs,
            seed=rng.derive_seed(cfg.train.seed, "spars", "warm"),
        )
        opponents = Opponents(
            agent,
            observer,
            kind=settings.kind,
            pool=settings.pool,
            latest=settings.latest,
            every=settings.every,
            dummy_first=settings.dummy_first,
        )
        warm = cfg.warm
        teacher = None if warm.kind == "none" else Teacher(table, warm.kind, gamma=warm.gamma)
        return cls(data, agent, observer, games, opponents, teacher, cfg.train.seed)

    def start(self, phase: str) -> None:
        """Begin the games of a phase, and make the present learner the first opponent."""
        self.env.reset(seed=rng.derive_seed(self.seed, "spars", phase))
        self.opponents.restart()

    def facts(self, cfg: SparsConfig) -> dict[str, Any]:
        """What the checkpoint says of the game."""
        return {
            "table": self.data.train.digest,
            "opponent": {
                "kind": cfg.opponents.kind,
                "pool": self.opponents.size,
                "every": self.opponents.every,
            },
            "tau": cfg.env.tau,
            "window": list(self.data.train.window),
            "stride": list(self.data.train.stride),
        }

    def flush(self) -> None:
        """Write new scores to disk."""
        for table in (self.data.train, self.data.val):
            if table is not None:
                table.flush()


# -- warm start --------------------------------------------------------------------------------------


def imitate(
    rt: Runtime, cfg: SparsConfig, game: Game, optimizer: torch.optim.Optimizer, step: int
) -> dict[str, float]:
    """One optimiser step towards the teacher's best moves."""
    warm, teacher = cfg.warm, game.teacher
    if teacher is None:
        return {}
    game.agent.train()
    generator = rng.torch_generator(cfg.train.seed, "spars", "teacher", step, rt.rank)
    observation, legal = walk_with(game.env, teacher, generator, warm.batch)
    targets, knows = teacher.targets(observation["case"].flatten(), observation["node"][:, 0])
    with rt.autocast():
        logits, _ = game.policy.logits_and_values(observation)
    loss = imitation_loss(logits, legal, targets, knows, warm.entropy)
    agreed = agreement(logits.detach(), legal, targets, knows)
    rt.backward(loss)
    rt.step(optimizer, clip_norm=cfg.ppo.clip_norm)
    return {"imitation_loss": float(loss.detach()), "agreement": agreed}


# -- PPO ---------------------------------------------------------------------------------------------


def improve(
    rt: Runtime, cfg: SparsConfig, game: Game, optimizer: torch.optim.Optimizer, step: int, number: int
) -> dict[str, float]:
    """One rollout and its updates."""
    ppo = cfg.ppo
    game.agent.train()
    buffer = RolloutBuffer(ppo.steps)
    last, facts = play(game.env, game.policy, game.opponents, buffer)
    batch = buffer.compute(last, gamma=ppo.gamma, lam=ppo.lam)
    only_value = number <= ppo.value_first
    if only_value:
        batch = dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages))
    stats = ppo_update(
        game.policy,
        optimizer,
        batch,
        numbers(cfg, only_value=only_value),
        generator=rng.torch_generator(cfg.train.seed, "spars", "minibatches", step, rt.rank),
        step=advancer(rt, optimizer, ppo.clip_norm),
        reduce=rt.reduce if rt.world_size > 1 else None,
    )
    game.opponents.tick(ppo.steps)
    return {**facts, **{name: value for name, value in stats.as_dict().items() if math.isfinite(value)}}


@torch.no_grad()
def play(
    env: HuntEnv, policy: Sighted, opponents: Opponents, buffer: RolloutBuffer
) -> tuple[Tensor, dict[str, float]]:
    """Fill the buffer from where the environment is; return the last values ``(E,)`` and what happened."""
    observation = env.observation()
    buffer.clear()
    earned, ended, scores, steps = 0.0, 0, 0.0, 0
    before = {number: list(counts) for number, counts in opponents.results.items()}
    while not buffer.full:
        masks = env.action_masks()
        if opponents.live:
            both = torch.cat([masks, env.action_masks(1)])
            noise = torch.cat([env.noise(0), env.noise(1)])
            moves, chances, worth = policy.act_with(env.both(), both, noise)
            (actions, other), log_probs, values = moves.chunk(2), chances.chunk(2)[0], worth.chunk(2)[0]
        else:
            actions, log_probs, values = policy.act_with(observation, masks, env.noise(0))
            other = opponents.act(env)
        following, rewards, over, cut, info = env.step_both(torch.stack([actions, other], dim=1))
        opponents.record(env, info["scores"])
        final = policy.value(following) if bool(cut.any()) else torch.zeros_like(values)
        buffer.add(
            observation, actions, log_probs, values, rewards, over, cut, masks=masks, final_values=final
        )
        earned += float(rewards.sum())
        scores += float(info["scores"][:, 0].sum())
        steps += len(rewards)
        closed = torch.nonzero(over | cut).flatten()
        if len(closed):
            ended += len(closed)
            following = env.reset(indices=closed)
        observation = following
    facts = {"reward": earned / steps, "score": scores / steps, "episodes": float(ended)}
    return policy.value(observation), {**facts, **_standing(opponents, before)}


def _standing(opponents: Opponents, before: dict[int, list[int]]) -> dict[str, float]:
    """Shares of steps won, drawn and lost: in this rollout against all, and so far against each opponent."""
    names = ("win", "draw", "loss")
    new = [0, 0, 0]
    for number, counts in opponents.results.items():
        old = before.get(number, [0, 0, 0])
        new = [total + count - past for total, count, past in zip(new, counts, old, strict=True)]
    found = {f"{name}_rate": count / max(1, sum(new)) for name, count in zip(names, new, strict=True)}
    rates = opponents.rates()
    members = (DUMMY,) if opponents.dummy else opponents.numbers or (LIVE,)
    for number in members:
        label = {LIVE: "live", DUMMY: "dummy"}.get(number, str(number))
        each = zip(names, rates.get(number, (0.0, 0.0, 0.0)), strict=True)
        found |= {f"{name}_vs_{label}": rate for name, rate in each}
    return found


def numbers(cfg: SparsConfig, *, only_value: bool = False) -> PPOConfig:
    """The numbers of PPO."""
    ppo = cfg.ppo
    return PPOConfig(
        gamma=ppo.gamma,
        lam=ppo.lam,
        clip=ppo.clip,
        epochs=ppo.epochs,
        minibatch=ppo.minibatch,
        value_coef=ppo.value_coef,
        entropy_coef=0.0 if only_value else ppo.entropy,
        max_grad_norm=ppo.clip_norm,
        target_kl=0.0 if only_value else ppo.target_kl,
        normalise_advantages=not only_value,
    )


def advancer(rt: Runtime, optimizer: torch.optim.Optimizer, clip_norm: float) -> Callable[[Tensor], None]:
    """Return what takes a loss, goes backward and steps, on all ranks together."""

    def advance(loss: Tensor) -> None:
        rt.backward(loss)
        rt.step(optimizer, clip_norm=clip_norm)

    return advance


def optimizers(cfg: SparsConfig, agent: HuntAgent) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """One for the imitation, one for PPO with the ε of Stable-Baselines3."""
    weights = list(agent.parameters())
    return torch.optim.Adam(weights, lr=cfg.warm.lr), torch.optim.Adam(weights, lr=cfg.ppo.lr, eps=1e-5)


def factor(cfg: SparsConfig, number: int) -> float:
    """Factor of the rate in an update from 1 on."""
    return 1.0 if cfg.ppo.decay == "constant" else 1.0 - (number - 1) / max(1, cfg.ppo.updates)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set and return the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def share(count: int, rank: int, world: int) -> list[int]:
    """Numbers of the volumes that a rank plays; all of them where there are fewer volumes than ranks.

    >>> share(5, 1, 2), share(2, 1, 3)
    ([1, 3], [0, 1])
    """
    return list(range(rank, count, world)) if count >= world else list(range(count))


# -- validation --------------------------------------------------------------------------------------


def validate(rt: Runtime, cfg: SparsConfig, game: Game) -> dict[str, float]:
    """How well the policy does in validation volumes that it never learned on; empty without any.

    ``val_score``: mean score of the last windows of the walks; ``val_best``: of the best ones; both divided
    by the largest score of the volume where all are known. ``val_covered``: part of the dense score that was
    visited.
    """
    table = game.data.val
    if table is None or game.held is None:
        return {}
    own = share(min(len(table), cfg.validation.volumes), rt.rank, rt.world_size)
    policy = SelfPlay(game.agent, game.held)
    plan = Episodes(episodes=cfg.validation.episodes, steps=cfg.env.horizon, start=cfg.env.start)
    found: dict[str, dict[str, float]] = {}
    for index in own:
        generator = rng.torch_generator(cfg.train.seed, "spars", "validation", index)
        visits = run(policy, table, index, plan, generator)
        case = torch.full((len(visits.final),), index, device=table.device)
        largest = max(float(table.full(index).max()), 1e-6) if table.fills else 1.0
        found[table.ids[index]] = {
            "val_score": float(table.scores(case, visits.final).mean()) / largest,
            "val_best": float(visits.scores.max()) / largest,
        }
        dense = table.dense(index)
        if dense is not None:
            lattice = table.lattices[index]
            seen = visit_count(lattice.shape, lattice.window, visits.corners) > 0
            mass = float(dense.sum())
            found[table.ids[index]]["val_covered"] = float(dense[seen].sum()) / mass if mass > 0.0 else 1.0
    everyone = rt.gather(found)
    names = next(iter(everyone.values())).keys()
    return {name: sum(item[name] for item in everyone.values()) / len(everyone) for name in names}
