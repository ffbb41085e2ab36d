"""Reinforcement learning on unlabelled target images: one iteration of PPO against a fixed reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medrl.core.adaptation.actors import Critic, PixelActor, recalibrate, shrink_and_perturb
from medrl.core.adaptation.players import Optimizers, Players, improve, set_rates
from medrl.core.adaptation.pseudo_labels import open_pseudo_labels
from medrl.core.adaptation.rewards import Judge
from medrl.core.rl.pixelwise import CollapseGuard, PixelwisePPOConfig, rollout
from medrl.core.rng import torch_generator

from . import parts, watching
from .config import Rl4segConfig
from .domains import Domains, draw, pieces
from .judging import open_judge
from .stages import batch_of, course_of, rate_of
from .watching import Watch

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime


def fit(rt: Runtime, cfg: Rl4segConfig, data: Domains) -> None:
    """Improve the policy on target images (specification §3; findings 7).

    The state is an image, the action a label map, the reward r of each pixel the estimated probability that
    its label is right; every pixel is an episode of one step. In each step

        a ~ π(·|s), r = R(a, s)
        k times:  r̃ = r − β (log π(a|s) − log π_ref(a|s)),  A = r̃ − V
                  L_π = −mean min(A ρ, A clip(ρ, 1 − ε, 1 + ε)) − c_H mean H,  L_V = mean (V − r)²

    with the ratio ρ of the policy to the one that acted. No label of a target image is read, unless the
    reward is an oracle.
    """
    players = start_players(rt, cfg, data)
    judge = open_judge(rt, cfg, data)
    numbers = settings(cfg)
    ppo, rates = cfg.ppo, {"actor": rate_of(cfg.ppo, cfg), "critic": cfg.ppo.critic_lr}
    optimizers, guard = players.optimizers(rates, ppo.weight_decay), None
    watch = Watch(cfg, speaks=rt.is_main)
    if ppo.collapse > 0.0 and players.reference is not None:
        guard = CollapseGuard(players.networks(), list(optimizers.values()), floor=ppo.collapse)
    register(rt, players, optimizers, guard, watch, data)

    images = data.target_images(cfg)
    given = open_pseudo_labels(cfg.inputs.pairs if ppo.pseudo_labels else (), images)
    rules = parts.rules_of(cfg, data.label_names)
    course = course_of(ppo, cfg, len(images.ids), rt.world_size)
    limits = {"actor": ppo.clip_norm, "critic": ppo.critic_clip_norm}
    for step in rt.steps(rt.checkpoint.resume(), course.steps):
        stats: dict[str, float] = {}
        facts: dict[str, float] = {}
        if step == 1:
            facts = watch.begin(validate(rt, cfg, data, players.actor, judge, rules))
        rate = set_rates(
            optimizers,
            rates,
            step,
            course.steps,
            warmup=ppo.warmup,
            linear=ppo.decay == "linear",
            guard=guard,
        )
        batch = draw(rt, images, cfg, stage="ppo", step=step, size=course.batch)
        players.actor.train()
        played = rollout(
            players.actor,
            players.reference,
            batch.images,
            judge.of(images, batch.index),
            numbers,
            generator=torch_generator(cfg.train.seed, "rl4seg", "actions", cfg.iteration, step, rt.rank),
            autocast=rt.autocast,
            **given.of(batch),
        )
        if guard is None or guard.check(played, reduce=rt.reduce):
            plain = ppo.algorithm == "pg"
            stats = improve(
                rt, players, optimizers, played, numbers, batch.ids, limits=limits, plain=plain
            ).as_dict()
        rt.log(step, **stats, lr=rate, restored=0 if guard is None else guard.restored, **facts)

        if step % course.every == 0 or step == rt.total_steps:
            found = validate(rt, cfg, data, players.actor, judge, rules)
            rt.log(step, **found, **watch.look(found))
            rt.best(step, found["val_reward"], name="val_reward")


def settings(cfg: Rl4segConfig) -> PixelwisePPOConfig:
    """Return the numbers of this iteration; the original's schedule divides c_H and β by 2i."""
    ppo = cfg.ppo
    share = 1.0 / (2 * cfg.iteration) if ppo.per_iteration == "original" else 1.0
    return PixelwisePPOConfig(
        clip=ppo.clip,
        inner_steps=ppo.inner_steps,
        entropy=ppo.entropy * share,
        kl=ppo.kl * share,
        baseline=ppo.baseline,
        constant=ppo.baseline_value,
        samples=ppo.group if ppo.baseline == "group" else 1,
        sigma_px=ppo.sigma_px,
        eps_greedy=cfg.actor.eps_greedy,
        forced_target=ppo.pseudo_target,
    )


def start_players(rt: Runtime, cfg: Rl4segConfig, data: Domains) -> Players:
    """Build policy, reference and critic from what earlier stages made.

    From the second iteration on, shrink and perturb may loosen what was learned (specification §9).
    """
    manager, bn_mode = rt.job.manager, cfg.actor.bn_mode

    def policy(what: str) -> PixelActor:
        network = parts.actor_network(cfg, manager, channels=data.channels, classes=data.classes)
        parts.load_part(getattr(cfg.inputs, what), "actor", network, f"inputs.{what}")
        return parts.as_actor(cfg, network, data.classes, bn_mode=bn_mode)

    actor = policy("actor")
    critic = None
    if cfg.ppo.uses_critic:
        critic = parts.critic(cfg, manager, channels=data.channels)
        if cfg.inputs.critic is not None:
            parts.load_part(cfg.inputs.critic, "critic", critic.network, "inputs.critic")
    reference = None
    if cfg.ppo.algorithm == "ppo":
        where = {"start": cfg.loop.start, "source": "source", "previous": "actor"}[cfg.ppo.reference]
        reference = policy(where if getattr(cfg.inputs, where) is not None else "actor")
        # Frozen statistics: a reference that normalises with the batch would not be one policy.
        reference = parts.as_actor(cfg, reference.network, data.classes).frozen()
    if cfg.loop.shrink_perturb and cfg.iteration > 1:
        loosen(cfg, data, [part for part in (actor, critic) if part is not None])
    return Players(actor, reference, critic).prepare(rt)


def loosen(cfg: Rl4segConfig, data: Domains, modules: list[PixelActor | Critic]) -> None:
    """Shrink and perturb; measure the statistics of batch norm anew if asked for."""
    for module in modules:
        name = type(module).__name__
        generator = torch_generator(cfg.train.seed, "rl4seg", "perturb", cfg.iteration, name)
        shrink_and_perturb(module.network, factor=cfg.loop.shrink, std=cfg.loop.perturb, generator=generator)
        if cfg.loop.recalibrate_bn:
            recalibrate(module, pieces(data.target_images(cfg), batch_of(cfg.ppo, cfg)))


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
    rt: Runtime, cfg: Rl4segConfig, data: Domains, actor: PixelActor, judge: Judge, rules: Any
) -> dict[str, float]:
    """Measure reward and validity on target validation images, without labels."""
    images = data.watched(cfg.ppo.validation_images)
    return watching.policy(rt, cfg, actor, lambda numbers: judge.of(images, numbers), images, rules)
