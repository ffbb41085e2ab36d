"""The policy: a warm start by imitation of exact gains, then proximal policy optimisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medrl.core import rng
from medrl.core.rl.ppo import PPOConfig, ppo_update
from medrl.core.rl.rollout import RolloutBatch, RolloutBuffer

from . import schedules
from .agent import Sighted
from .candidates import quality_of
from .config import KspaceConfig
from .domain import Data
from .env import KSpaceEnv
from .evaluate import area, spread
from .game import Game
from .plan import Plan
from .policies import AgentLines
from .rewards import centred
from .warmstart import StateCollector, States, fit_scales, imitate_epoch, imitation_score, standardised

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


def fit(rt: Runtime, cfg: KspaceConfig, data: Data) -> None:
    """Learn which line to acquire next (specification §6; findings, recipe).

    State s: the lines so far, what image and segmentation they give, and how many lines remain. Action a:
    the next line. Warm start: in many states the gain of quality g(a) by every line is computed exactly, with
    the labels, and the policy minimises

        −Σ_a π(a|s) ĝ(a) − β H(π),   ĝ: g standardised,

    first in states on the way of oracle and random lines, then on the policy's own way. PPO goes on from
    there with the reward of the config,

        L = −mean min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) + c_v mean (V − R)² − c_H mean H,   A by GAE.

    Rollouts keep masks and counters; images are made again from their lines.
    """
    game = Game.build(rt, cfg, data)
    plan = Plan.of(cfg, rt.world_size)
    warm, tuned = optimizers(cfg, game)
    env = game.environment(cfg, rt)
    collector = game.collector(cfg, rt) if cfg.warm.kind == "greedy" else None
    memory = Memory()
    rt.checkpoint.register(**game.networks())
    rt.checkpoint.register(warm_optimizer=warm, optimizer=tuned, env=env, memory=memory)
    if collector is not None:
        rt.checkpoint.register(collector=collector)
    rt.checkpoint.describe(**data.facts(cfg), blind=cfg.blind, dealt=dict(game.dealt))
    done = rt.checkpoint.resume()
    if done == 0:
        rt.checkpoint.describe(ready=False)
        rt.checkpoint.save(0)
        game.fill(rt, cfg, data)
        rt.checkpoint.describe(ready=True)
    game.ready()
    rt.checkpoint.describe(ready=True)

    total = min(plan.total, cfg.train.max_steps) if cfg.train.max_steps else plan.total
    every = cfg.train.validate_every or max(1, total // 10)
    for step in rt.steps(done, total):
        phase, number = plan.at(step)
        facts: dict[str, Any]
        if phase == "collect" and collector is not None:
            facts = collect(cfg, game, collector, memory, half=plan.half(step))
        elif phase == "imitate":
            rate = schedules.set_rate(warm, cfg.warm.lr * plan.imitation_factor(number))
            facts = {**imitate(rt, cfg, game, memory, warm, step, number), "lr": rate}
        else:
            rate = schedules.set_rate(tuned, cfg.ppo.lr * plan.ppo_factor(number))
            facts = {**improve(rt, cfg, game, env, tuned, step, number), "lr": rate}
        rt.log(step, phase=phase, **facts)
        if phase != "collect" and (step % every == 0 or step == rt.total_steps or plan.ends_phase(step)):
            found = validate(rt, cfg, game)
            rt.log(step, **found)
            rt.best(step, found["val_score"], name="val_score")


# -- warm start --------------------------------------------------------------------------------------


class Memory:
    """The states of the warm start so far; part of the checkpoint of each rank."""

    def __init__(self) -> None:
        self.parts: list[States] = []

    def add(self, states: States) -> None:
        """Take in some states."""
        self.parts.append(states)

    def all(self, device: torch.device | None = None) -> States:
        """All states as one set, on a device."""
        if device is not None:
            self.parts = [moved(part, device) for part in self.parts]
        self.parts = [States.joined(self.parts)]
        return self.parts[0]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"states": self.all().state_dict()} if self.parts else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.parts = [States.from_state_dict(state["states"])] if "states" in state else []


def moved(states: States, device: torch.device) -> States:
    """States on a device."""
    found = {
        name: {key: item.to(device) for key, item in value.items()} if name == "seen" else value.to(device)
        for name, value in states.state_dict().items()
    }
    return States.from_state_dict(found)


def collect(
    cfg: KspaceConfig, game: Game, collector: StateCollector, memory: Memory, *, half: int
) -> dict[str, float]:
    """Compute the gains of one chunk of states; in the second half the policy itself leads to them."""
    if half == 0:
        states = collector.collect(oracle=cfg.warm.oracle)
    else:
        states = collector.collect(game.policy, oracle=0.0)
    memory.add(states)
    best = states.gains.masked_fill(~states.legal, -torch.inf).amax(dim=1)
    return {"best_gain": float(best.mean())}


def imitate(
    rt: Runtime,
    cfg: KspaceConfig,
    game: Game,
    memory: Memory,
    optimizer: torch.optim.Optimizer,
    step: int,
    number: int,
) -> dict[str, float]:
    """One pass over the states so far; the first one sets the scales of the agent's features."""
    states = memory.all(rt.device)
    if number == 1:
        fit_scales(game.policy, states)
        game.share_scales(rt)
    game.agent.train()
    generator = rng.torch_generator(cfg.train.seed, "kspace", "imitation", step, rt.rank)
    loss = imitate_epoch(
        game.policy,
        standardised(states),
        batch=cfg.warm.batch,
        entropy=cfg.warm.entropy,
        generator=generator,
        step=advancer(rt, optimizer, cfg.warm.clip_norm),
    )
    score = imitation_score(game.policy, states)
    return {"imitation_loss": loss, **{f"imitation_{name}": value for name, value in score.items()}}


# -- PPO ---------------------------------------------------------------------------------------------


def improve(
    rt: Runtime,
    cfg: KspaceConfig,
    game: Game,
    env: KSpaceEnv,
    optimizer: torch.optim.Optimizer,
    step: int,
    number: int,
) -> dict[str, float]:
    """One rollout and its updates."""
    ppo = cfg.ppo
    game.agent.train()
    if number == 1:
        env.reset(seed=rng.derive_seed(cfg.train.seed, "kspace", "episodes", rt.rank))
        if cfg.warm.kind == "none" and rt.job.init_from is None:
            game.fit_scales_anew(cfg, rt)
    drawing = torch.Generator(device=rt.device)
    drawing.manual_seed(rng.derive_seed(cfg.train.seed, "kspace", "lines", step, rt.rank))
    buffer = RolloutBuffer(ppo.steps or max(cfg.budget.train))
    last, ended = play(env, game.policy, buffer, drawing)
    earned = float(buffer["rewards"].sum()) / max(1, ended)
    if ppo.group > 1:
        buffer["rewards"].copy_(centred(buffer["rewards"], ppo.group))
    batch = buffer.compute(last, gamma=ppo.gamma, lam=ppo.lam)
    only_value = number <= ppo.value_first
    batch = _with(batch, advantages=_advantages(rt, cfg, batch.advantages, only_value=only_value))
    stats = ppo_update(
        game.policy,
        optimizer,
        batch,
        numbers(cfg, only_value=only_value),
        generator=rng.torch_generator(cfg.train.seed, "kspace", "minibatches", step, rt.rank),
        step=advancer(rt, optimizer, ppo.clip_norm),
        reduce=rt.reduce if rt.world_size > 1 else None,
    )
    return {"reward": earned, "episodes": float(ended), **_finite(stats.as_dict())}


@torch.no_grad()
def play(
    env: KSpaceEnv, policy: Sighted, buffer: RolloutBuffer, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Fill the buffer from where the environment is; return the last values ``(E,)`` and the ended episodes.

    What follows depends on the state of the environment alone, so that a resumed run goes on bit for bit.
    """
    observation = env.refresh()
    buffer.clear()
    ended = 0
    while not buffer.full:
        masks = env.action_masks()
        actions, log_probs, values = policy.act(observation, masks, generator)
        following, rewards, done = env.advance(actions)
        never = torch.zeros_like(done)
        buffer.add(observation, actions, log_probs, values, rewards, done, never, masks=masks)
        ended += int(done.sum())
        observation = following
    return policy.value(observation), ended


def numbers(cfg: KspaceConfig, *, only_value: bool = False) -> PPOConfig:
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
        value_clip=ppo.value_clip,
        pessimistic_value=True,
        max_grad_norm=ppo.clip_norm,
        target_kl=ppo.target_kl,
        normalise_advantages=ppo.normalise == "minibatch" and not only_value,
    )


def advancer(rt: Runtime, optimizer: torch.optim.Optimizer, clip_norm: float) -> Callable[[Tensor], None]:
    """Return what takes a loss, goes backward and steps, on all ranks together."""

    def advance(loss: Tensor) -> None:
        rt.backward(loss)
        rt.step(optimizer, clip_norm=clip_norm)

    return advance


def optimizers(cfg: KspaceConfig, game: Game) -> tuple[torch.optim.AdamW, torch.optim.AdamW]:
    """One for the imitation, one for PPO."""
    weights = list(game.agent.parameters())
    return (
        torch.optim.AdamW(weights, lr=cfg.warm.lr, weight_decay=cfg.warm.weight_decay),
        torch.optim.AdamW(weights, lr=cfg.ppo.lr, weight_decay=cfg.ppo.weight_decay),
    )


# -- validation --------------------------------------------------------------------------------------


def validate(rt: Runtime, cfg: KspaceConfig, game: Game) -> dict[str, float]:
    """Quality of validation cases after greedy episodes of every budget, and the area under that curve."""
    observer = game.held
    own = spread(len(observer.cases), cfg.validation.cases)[rt.rank :: rt.world_size]
    policy, curve = AgentLines(game.agent), {}
    for budget in cfg.budget.eval:
        found: dict[str, float] = {}
        if len(own):
            case = own.to(rt.device)
            lines = policy.order(observer, case, budget, torch.Generator())
            mask = observer.cases.rows("initial", case).clone().scatter_(1, lines, value=True)
            quality = quality_of(observer, game.quality, case, mask).tolist()
            found = {observer.cases.ids[at]: value for at, value in zip(own.tolist(), quality, strict=True)}
        everyone = rt.gather(found)
        curve[budget] = sum(everyone.values()) / len(everyone)
    return {"val_score": area(curve), **{f"val_score_{budget}": value for budget, value in curve.items()}}


# -- private -----------------------------------------------------------------------------------------


def _advantages(rt: Runtime, cfg: KspaceConfig, advantages: Tensor, *, only_value: bool) -> Tensor:
    """Advantages of this rank, standardised over all ranks where the config says so."""
    if only_value:
        return torch.zeros_like(advantages)
    if cfg.ppo.normalise == "minibatch":
        return advantages
    sums = torch.stack([advantages.sum(), advantages.square().sum()]).double()
    mean, power = (float(value) for value in rt.reduce(sums) / advantages.numel())
    spread_of = math.sqrt(max(power - mean * mean, 0.0))
    return (advantages - mean) / (spread_of + 1e-8)


def _with(batch: RolloutBatch, **changes: Any) -> RolloutBatch:
    from dataclasses import replace

    return replace(batch, **changes)


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
