"""The training loop of graft: one student, its projections, and the agent that weighs the teachers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medrl.core.checkpoint import load_checkpoint, load_into
from medrl.core.errors import CheckpointError, ConfigError
from medrl.core.rng import derive_seed, torch_generator

from . import validation
from .agent import (
    Action,
    AgentSettings,
    FreePolicy,
    PolicyState,
    TeacherAgent,
    TeacherPolicy,
    make_state,
    state_channels,
    state_scalars,
)
from .config import GraftConfig
from .data import GraftData, agent_acts, build_network
from .features import LOGITS
from .init_from import apply_weights, init_student
from .losses import Projections
from .models import PlainConvUNet, StudentOutput, as_output, tap
from .objective import Objective
from .priors import Priors, batch_quality, floor_of, measure
from .regions import teacher_probabilities
from .rewards import RewardMeter
from .samples import Batch, collate
from .weighting import (
    TerminalReward,
    disagreement,
    entropy,
    from_quality,
    similarity,
    warmup_alpha,
    with_floor,
)

if TYPE_CHECKING:
    from pathlib import Path

    from medrl.core.runtime import Runtime

_log = logging.getLogger("medrl.graft")


def fit(rt: Runtime, cfg: GraftConfig, data: GraftData) -> None:
    """Distil the teachers of `data` into one student (specification §4 to §6).

    Without teachers the same loop trains on labels alone, which is how teachers and baselines are made.

    One step: the student sees a batch; the weights of the teachers come from their quality or from the agent;
    the student learns from labels, teachers' features and teachers' logits; if there is an agent, the change
    of the reward that this update caused is what its action earned, and at the end of an episode it learns.
    """
    student = start_student(rt, cfg, data)
    projections = build_projections(cfg, data, student)
    objective = Objective(cfg, data.plan.target, data.taps if projections is not None else ())
    kinds = weighed_kinds(cfg, data)
    priors = measure(cfg, data, kinds)
    policy = build_policy(cfg, data, kinds)
    rt.prepare(*(module for module in (student, projections, priors, policy) if module is not None))
    layout = torch.channels_last_3d if cfg.train.channels_last else torch.contiguous_format
    student.to(memory_format=layout)

    optimizer = build_optimizer(cfg, student, projections)
    rt.checkpoint.register(student=student, priors=priors, optimizer=optimizer)
    if projections is not None:
        rt.checkpoint.register(projections=projections)
    learner = None if policy is None else Learner(rt, cfg, data, policy, priors)
    rt.checkpoint.describe(
        label_names=dict(data.plan.labels),
        channel_names=list(data.plan.channel_names),
        spacing=list(data.plan.spacing),
        plan=data.plan.to_meta(),
        teachers=[teacher.teacher for teacher in data.teachers],
    )
    batches = Batches(rt, cfg, data)
    val_cases = validation.loader(rt, cfg, data)
    every = cfg.train.validate_every or batches.steps_per_epoch

    for step in rt.steps(rt.checkpoint.resume(), cfg.train.max_steps):
        rate = set_rate(optimizer, cfg, step)
        facts: dict[str, Any] = {}
        for _ in rt.micro_batches():
            batch = next(batches)
            with rt.autocast():
                output = as_output(student(batch.image.contiguous(memory_format=layout)))
                if learner is not None:
                    weights = learner.act(step, batch, output, projections)
                else:
                    weights = fixed_weights(cfg, data, priors, batch)
                loss, facts = objective(output, batch, projections, weights)
            rt.backward(loss, cases=batch.case_ids)
            facts |= described(weights, data.teacher_names)
        if learner is not None:
            learner.before(step, student, batch)
        done = rt.step(optimizer, clip_norm=cfg.train.clip_norm)
        if learner is not None:
            facts |= learner.after(step, student, applied=done.applied)
        rt.log(step, **facts, lr=rate, grad_norm=done.grad_norm)

        if step % every == 0 or step == rt.total_steps:
            result = validation.validate(rt, student, val_cases, data.plan.target)
            rt.log(step, epoch=step / batches.steps_per_epoch, **result.metrics())
            if rt.best(step, result.metrics()["val_dice"]):
                validation.write_summary(rt, step, result)


class Learner:
    """The agent inside the loop: acts, measures what its actions earn, learns at the end of an episode.

    Args:
        rt: The run.
        cfg: Its config.
        data: Teachers and reward cases.
        policy: Prepared by `rt`.
        priors: What the policy is a residual on.
    """

    def __init__(
        self, rt: Runtime, cfg: GraftConfig, data: GraftData, policy: nn.Module, priors: Priors
    ) -> None:
        settings = AgentSettings(
            kappa=cfg.agent.kappa,
            floor=floor_of(cfg),
            gamma=cfg.agent.gamma,
            entropy=cfg.agent.entropy,
            baseline_momentum=cfg.agent.baseline_momentum,
            scale=cfg.agent.scale,
            seed=derive_seed(cfg.train.seed, "graft", "agent"),
        )
        self.rt, self.cfg, self.data, self.priors = rt, cfg, data, priors
        self.agent = TeacherAgent(policy, settings)
        self.terminal = TerminalReward(cfg.agent.baseline_momentum)
        self.noise = torch_generator(cfg.train.seed, "graft", "random reward")
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=cfg.agent.lr)
        self.meter = RewardMeter(cfg, data, rt.device)
        self._action: Action | None = None
        self._measured: Batch | None = None
        self._before = 0.0
        rt.checkpoint.register(
            policy=policy,
            agent=self.agent,
            agent_optimizer=self.optimizer,
            terminal_reward=self.terminal,
            reward_noise=self.noise,
        )

    def act(
        self, step: int, batch: Batch, output: StudentOutput, projections: Projections | None
    ) -> dict[str, Tensor]:
        """Draw the weights of a batch; all micro-batches of a step share the first one's draw."""
        size = len(batch.case_ids)
        if self._action is not None:
            return {kind: raw[:1].expand(size, -1) for kind, raw in self._action.weights.items()}
        state = None
        if self.cfg.agent.policy == "state":
            state = observe(self.cfg, self.data, batch, output, projections, self.priors)
        prior = self.priors.batch(size)
        alpha = warmup_alpha(step - 1, self.cfg.agent.warmup, total=self.cfg.train.max_steps)
        self._action = self.agent.act(state, prior, alpha=alpha, start=prior)
        # A policy without a state gives one row of weights for all samples.
        return {kind: weights.expand(size, -1) for kind, weights in self._action.weights.items()}

    def before(self, step: int, student: nn.Module, batch: Batch) -> None:
        """Measure the student just before the update that the action causes."""
        self._measured = None
        if self._due(step):
            episode = (step - 1) // (self.cfg.agent.interval * self.cfg.agent.reward_every)
            self._measured = self.meter.batch(episode, batch)
            self._before = self.meter.level(student, self._measured)

    def after(self, step: int, student: nn.Module, *, applied: bool) -> dict[str, Any]:
        """Give the action its reward, and learn if the episode is over; return numbers for the log."""
        facts: dict[str, Any] = {}
        action, measured = self._action, self._measured
        self._action = self._measured = None
        if action is not None and measured is not None and applied:
            change = self.meter.level(student, measured) - self._before
            reward = self.rt.reduce(change)
            if self.cfg.agent.random_reward:
                reward = float(torch.randn((), generator=self.noise))
            if math.isfinite(reward):
                self.agent.record(action, reward)
            facts["reward"] = reward
        if len(self.agent.episode) >= self.cfg.agent.interval:
            facts |= self._learn(student)
        return facts

    def _learn(self, student: nn.Module) -> dict[str, Any]:
        """End the episode with one REINFORCE update."""
        terminal = 0.0
        facts: dict[str, Any] = {}
        if self.cfg.agent.terminal and self.meter.on_split:
            dice = self.meter.dice(student)
            terminal = self.terminal(dice)
            if self.cfg.agent.random_reward:
                terminal = float(torch.randn((), generator=self.noise))
            facts |= {"reward_dice": dice, "terminal_reward": terminal}
        loss, report = self.agent.loss(terminal=terminal)
        self.rt.backward(loss)
        self.rt.step(self.optimizer, clip_norm=self.cfg.agent.clip_norm)
        names = self.data.teacher_names
        with torch.no_grad():
            means = {} if self.cfg.agent.policy == "state" else self.agent.means(None, self.priors.batch(1))
        return {
            **facts,
            "return": report.mean_return,
            "return_baseline": report.baseline,
            "return_scale": report.scale,
            **{
                key: value
                for kind, mean in means.items()
                for key, value in by_teacher(f"policy_{kind}", mean[0].tolist(), names).items()
            },
            **{
                key: value
                for kind, found in self.agent.correlation.items()
                for key, value in by_teacher(f"correlation_{kind}", found.values, names).items()
            },
        }

    def _due(self, step: int) -> bool:
        alpha = warmup_alpha(step - 1, self.cfg.agent.warmup, total=self.cfg.train.max_steps)
        return alpha > 0.0 and step % self.cfg.agent.reward_every == 0


class Batches:
    """Endless batches; with unlabelled cases, half of each batch is labelled and half is not."""

    def __init__(self, rt: Runtime, cfg: GraftConfig, data: GraftData) -> None:
        size = cfg.train.batch_size
        parts = [("labelled", data.labelled, size)]
        if data.unlabelled:
            parts = [
                ("labelled", data.labelled, size // 2),
                ("unlabelled", data.unlabelled, size - size // 2),
            ]
        if not data.labelled:
            parts = [("unlabelled", data.unlabelled, size)]
        self.device = rt.device
        self.loaders: list[Iterator[Any]] = []
        lengths = []
        for name, cases, share in parts:
            samples = data.samples(cases, teachers=True, labelled=name == "labelled", augment=cfg.augment)
            made = rt.loader(samples, batch_size=share, shuffle=True, collate=collate, name=name)
            self.loaders.append(made)
            lengths.append(len(made))
        self.steps_per_epoch = max(1, math.ceil(max(lengths) / cfg.train.accumulate))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        return Batch.join([next(loader) for loader in self.loaders]).to(self.device)


def start_student(rt: Runtime, cfg: GraftConfig, data: GraftData) -> nn.Module:
    """Build the student and, if asked for, start it from a checkpoint of medrl or of nnU-Net."""
    student = build_network(cfg, rt.job.manager, data.in_channels, data.plan.target.channels)
    path = rt.job.init_from
    if path is not None:
        load_start(
            student, path, cfg, trust=rt.job.trust_checkpoint, regions=data.plan.target_kind == "binary"
        )
    return student


def load_start(student: nn.Module, path: Path, cfg: GraftConfig, *, trust: bool, regions: bool) -> None:
    """Copy weights into a student that begins.

    Raises:
        CheckpointError: The weights do not fit.
    """
    scope = cfg.optim.init_scope
    try:
        weights: Mapping[str, Tensor] = load_checkpoint(path, method="graft").states["student"]
    except CheckpointError as error:
        if "is no checkpoint of medrl" not in error.what and "footer" not in error.why:
            raise
        report = init_student(student, path, scope=scope, trust=trust, regions=regions)
    else:
        if not isinstance(student, PlainConvUNet):
            load_into(student, dict(weights))
            return
        report = apply_weights(student, weights, scope=scope, regions=regions, what=str(path))
    _log.info("start from %s: %s", path, report.summary)


def build_projections(cfg: GraftConfig, data: GraftData, student: nn.Module) -> Projections | None:
    """The maps to the teachers' features, or None without feature distillation.

    Raises:
        ConfigError: The student has no such taps.
    """
    if not data.teachers or not data.taps:
        return None
    known: Mapping[str, int] = getattr(student, "feature_channels", {})
    if not known:
        raise ConfigError(
            f"model {cfg.model.name}",
            why="it offers no features to distil",
            do="choose a model of graft, or --feat-weight 0 --kd-weight 1",
        )
    channels = [teacher.channels for teacher in data.teachers]
    return Projections(known, channels, taps=data.taps, kind=cfg.distill.projection)


def build_optimizer(
    cfg: GraftConfig, student: nn.Module, projections: Projections | None
) -> torch.optim.Optimizer:
    """One optimiser over student and projections."""
    modules = [module for module in (student, projections) if module is not None]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if cfg.optim.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=cfg.train.lr,
            momentum=cfg.optim.momentum,
            nesterov=cfg.optim.momentum > 0,
            weight_decay=cfg.train.weight_decay,
        )
    return torch.optim.AdamW(parameters, lr=cfg.train.lr, weight_decay=cfg.train.weight_decay)


def build_policy(cfg: GraftConfig, data: GraftData, kinds: tuple[str, ...]) -> nn.Module | None:
    """The agent's network, or None where nothing is left to decide."""
    if not kinds or not agent_acts(cfg):
        return None
    if cfg.agent.policy == "free":
        return FreePolicy(len(data.teachers), heads=kinds)
    return TeacherPolicy(
        [state_channels(teacher.channels, data.taps) for teacher in data.teachers],
        state_scalars(data.taps, disagreement=cfg.agent.disagreement),
        heads=kinds,
    )


def weighed_kinds(cfg: GraftConfig, data: GraftData) -> tuple[str, ...]:
    """What teachers are weighed for: each tap, and the logits."""
    if not data.teachers:
        return ()
    return (*data.taps, *((LOGITS,) if cfg.distill.logit_weight > 0 else ()))


def fixed_weights(cfg: GraftConfig, data: GraftData, priors: Priors, batch: Batch) -> dict[str, Tensor]:
    """Weights without an agent, ``(B, N)`` by kind; with scope `case` each labelled case has its own."""
    weights = priors.batch(len(batch.case_ids))
    if cfg.weighting.mode != "quality" or cfg.weighting.scope != "case" or not weights:
        return weights
    quality = torch.where(batch.labelled[:, None], batch_quality(batch, data), priors.quality[None])
    own = with_floor(from_quality(quality, temperature=cfg.weighting.temperature), floor_of(cfg))
    return dict.fromkeys(weights, own)


@torch.no_grad()
def observe(
    cfg: GraftConfig,
    data: GraftData,
    batch: Batch,
    output: StudentOutput,
    projections: Projections | None,
    priors: Priors,
) -> PolicyState:
    """What the policy sees of a batch: maps, likeness to the student, quality, disagreement."""
    target = data.plan.target
    alike = {}
    for name in data.taps if projections is not None else ():
        theirs = batch.features[name]
        mine = projections(name, tap(output, name).detach(), [t.shape[2:] for t in theirs])
        alike[name] = similarity(mine, theirs)
    found = [teacher_probabilities(logits, target) for logits in batch.logits]
    quality = torch.where(batch.labelled[:, None], batch_quality(batch, data), priors.quality[None])
    features = [{name: batch.features[name][i] for name in alike} for i in range(len(found))]
    return make_state(
        features,
        batch.logits,
        taps=tuple(alike),
        similarity=alike,
        quality=quality,
        disagreement=disagreement(found, target.focus) if cfg.agent.disagreement else None,
    )


def described(weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """Mean weight of each teacher and their entropy in nats, for the log: ``weights_neg1/teacher_0``."""
    facts: dict[str, Any] = {}
    for kind, values in weights.items():
        mean = values.detach().float().mean(dim=0)
        facts |= by_teacher(f"weights_{kind}", mean.tolist(), names)
        facts[f"entropy_{kind}"] = entropy(mean)
    return facts


def by_teacher(what: str, values: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """One number for each teacher under a key of its own, so that reports draw them in one chart."""
    return {f"{what}/{name}": value for name, value in zip(names, values, strict=True)}


def set_rate(optimizer: torch.optim.Optimizer, cfg: GraftConfig, step: int) -> float:
    """Set and return the learning rate of a step (from 1)."""
    rate = cfg.train.lr * schedule(cfg, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def schedule(cfg: GraftConfig, step: int) -> float:
    """Factor of the learning rate at a step (from 1): a linear ramp on cosine, steps, or constant.

    Source: specification §6; the original counts epochs.
    """
    total, done = cfg.train.max_steps, step - 1
    factor = 1.0
    if cfg.optim.schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * done / total))
    elif cfg.optim.schedule == "multistep":
        factor = 0.1 ** sum(done >= part * total for part in cfg.optim.milestones)
    if done < cfg.optim.ramp:
        factor *= 0.1 + 0.9 * done / cfg.optim.ramp
    return factor
