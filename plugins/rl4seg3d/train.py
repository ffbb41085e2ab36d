"""Reinforcement learning on windows of unlabelled target sequences: one iteration of PPO."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medrl.core.adaptation import watching
from medrl.core.adaptation.actors import CategoricalActor, PixelActor
from medrl.core.adaptation.players import Optimizers, Players, improve, set_rates
from medrl.core.adaptation.pseudo_labels import open_pseudo_labels
from medrl.core.adaptation.rewards import Judge, RewardFn
from medrl.core.adaptation.watching import Valid, Watch
from medrl.core.rl.pixelwise import CollapseGuard, PixelwisePPOConfig, rollout
from medrl.core.rng import torch_generator

from . import parts
from .config import Rl4seg3dConfig
from .domains import METHOD, Batch, Domains, ImageSet, draw, known_sequences
from .judging import open_judge
from .rewards import FusedReward
from .stages import course_of

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


def fit(rt: Runtime, cfg: Rl4seg3dConfig, data: Domains) -> None:
    """Improve the policy on target windows (specification §5; findings of rl4seg, 7).

    The state is a window of four frames, the action a label map, the reward r of each voxel what the reward
    nets together make of it; every voxel is an episode of one step. In each step

        a ~ π(·|s), r = min over nets R_n(a, s)
        k times:  r̃ = r − β (log π(a|s) − log π_ref(a|s)),  A = r̃ − V
                  L_π = −mean min(A ρ, A clip(ρ, 1 − ε, 1 + ε)) − c_H mean H,  L_V = Σ 2⁻ⁱ mean (V_i − r_i)²

    with the ratio ρ of the policy to the one that acted. No label of a target sequence is read, unless the
    reward is an oracle.
    """
    players = start_players(rt, cfg, data)
    judge = open_judge(rt, cfg, data)
    numbers, ppo = settings(cfg), cfg.ppo
    rates = {"actor": ppo.lr or cfg.train.lr, "critic": ppo.critic_lr}
    optimizers, guard = players.optimizers(rates, ppo.weight_decay), None
    watch = Watch(ppo.alarm_validity, help=advice(cfg), speaks=rt.is_main)
    if ppo.collapse > 0.0 and players.reference is not None:
        guard = CollapseGuard(players.networks(), list(optimizers.values()), floor=ppo.collapse)
    register(rt, players, optimizers, guard, watch, data)

    sequences, watched = data.target_sequences(cfg), data.watched(ppo.validation_images)
    given = open_pseudo_labels(cfg.inputs.pairs if ppo.pseudo_labels else ())
    known = known_sequences(cfg, data.target.train)
    valid = parts.validity(cfg, data.label_names)
    course = course_of(ppo, cfg, len(sequences), rt.world_size)
    limits = {"actor": ppo.clip_norm, "critic": ppo.critic_clip_norm}
    for step in rt.steps(rt.checkpoint.resume(), course.steps):
        stats: dict[str, float] = {}
        facts: dict[str, float] = {}
        if step == 1:
            facts = watch.begin(validate(rt, cfg, players.actor, judge, watched, valid))
        rate = set_rates(
            optimizers,
            rates,
            step,
            course.steps,
            warmup=ppo.warmup,
            linear=ppo.decay == "linear",
            guard=guard,
        )
        batch = draw(rt, sequences, cfg, stage="ppo", step=step, size=course.batch, known=given.masks)
        players.actor.train()
        judged: dict[str, list[Tensor]] = {}
        reward = judge.on(batch.labels)
        if ppo.rewards == "separate" and isinstance(judge.reward, FusedReward):
            reward = remembering(judge.reward, judged)
        played = rollout(
            players.actor,
            players.reference,
            batch.images,
            reward,
            numbers,
            generator=torch_generator(cfg.train.seed, METHOD, "actions", cfg.iteration, step, rt.rank),
            greedy=cfg.actor.actions == "greedy",
            autocast=rt.autocast,
            **with_truth(given.of(batch), batch, known),
        )
        if guard is None or guard.check(played, reduce=rt.reduce):
            stats = improve(
                rt,
                players,
                optimizers,
                played,
                numbers,
                batch.ids,
                limits=limits,
                plain=ppo.algorithm == "pg",
                rewards=judged.pop("maps", ()),
            ).as_dict()
        rt.log(step, **stats, lr=rate, restored=0 if guard is None else guard.restored, **facts)

        if step % course.every == 0 or step == rt.total_steps:
            found = validate(rt, cfg, players.actor, judge, watched, valid)
            rt.log(step, **found, **watch.look(found))
            rt.best(step, found["val_reward"], name="val_reward")


def remembering(reward: FusedReward, judged: dict[str, list[Tensor]]) -> RewardFn:
    """Return the fused reward as a function that keeps the rewards of the networks in `judged`."""

    def call(actions: Tensor, images: Tensor) -> Tensor:
        judged["maps"] = list(reward.maps(actions, images).values())
        return reward.fused(judged["maps"], actions)

    return call


def with_truth(given: dict[str, Any], batch: Batch, known: Collection[str]) -> dict[str, Any]:
    """Add the true labels of windows of known sequences to the arguments `forced`, `forced_actions`."""
    if not known:
        return given
    truth = batch.truth().cpu()
    here = torch.tensor([name.rpartition("_t")[0] in known for name in batch.ids])
    before = given or {"forced": torch.zeros_like(here), "forced_actions": torch.zeros_like(truth)}
    rows = here.reshape(-1, *[1] * (truth.ndim - 1))
    return {
        "forced": before["forced"] | here,
        "forced_actions": torch.where(rows, truth, before["forced_actions"]),
    }


def settings(cfg: Rl4seg3dConfig) -> PixelwisePPOConfig:
    """Return the numbers of this iteration; the original's schedule divides c_H and β by i."""
    ppo = cfg.ppo
    share = 1.0 / cfg.iteration if ppo.per_iteration == "original" else 1.0
    smooth = (ppo.sigma_px, ppo.sigma_px, ppo.sigma_t) if ppo.sigma_px or ppo.sigma_t else 0.0
    return PixelwisePPOConfig(
        clip=ppo.clip,
        inner_steps=ppo.inner_steps,
        entropy=ppo.entropy * share,
        kl=ppo.kl * share,
        baseline=ppo.baseline,
        constant=ppo.baseline_value,
        samples=ppo.group if ppo.baseline == "group" else 1,
        sigma_px=smooth,
        eps_greedy=cfg.actor.eps_greedy,
        forced_target=ppo.pseudo_target,
    )


def start_players(rt: Runtime, cfg: Rl4seg3dConfig, data: Domains) -> Players:
    """Build policy, reference and critic from what earlier stages made."""
    manager = rt.job.manager

    def policy(what: str) -> CategoricalActor:
        network = parts.actor_network(cfg, manager, channels=data.channels, classes=data.classes)
        parts.load_part(getattr(cfg.inputs, what), "actor", network, f"inputs.{what}")
        return parts.as_actor(network, data.classes)

    actor, critic, reference = policy("actor"), None, None
    if cfg.ppo.uses_critic:
        critic = parts.critic(cfg, manager, channels=data.channels)
        if cfg.inputs.critic is not None:
            parts.load_part(cfg.inputs.critic, "critic", critic.network, "inputs.critic")
    if cfg.ppo.algorithm == "ppo":
        where = {"start": cfg.loop.start, "source": "source", "previous": "actor"}[cfg.ppo.reference]
        reference = policy(where if getattr(cfg.inputs, where) is not None else "actor").frozen()
    return Players(actor, reference, critic).prepare(rt)


def register(
    rt: Runtime,
    players: Players,
    optimizers: Optimizers,
    guard: CollapseGuard | None,
    watch: Watch,
    data: Domains,
) -> None:
    """Name everything that a resumed run needs."""
    rt.checkpoint.register(**players.networks())
    rt.checkpoint.register(**{f"{name}_optimizer": item for name, item in optimizers.items()})
    rt.checkpoint.register(watch=watch)
    if guard is not None:
        rt.checkpoint.register(guard=guard)
    rt.checkpoint.describe(**data.facts())


def validate(
    rt: Runtime,
    cfg: Rl4seg3dConfig,
    actor: PixelActor,
    judge: Judge,
    watched: ImageSet,
    valid: Valid,
) -> dict[str, float]:
    """Measure reward and validity on windows of target validation sequences, without labels."""
    return watching.policy(
        rt,
        actor,
        lambda numbers: judge.of(watched, numbers),
        watched,
        valid,
        sigma_px=settings(cfg).sigma_px,
        stream=lambda name: torch_generator(cfg.train.seed, METHOD, "validation", name),
    )


def advice(cfg: Rl4seg3dConfig) -> str:
    """What helps against a poor start, beside training longer."""
    return "" if cfg.loop.start == "style" else "start from the style-tuned actor (--start style), "
