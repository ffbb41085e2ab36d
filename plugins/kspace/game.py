"""Everything that a policy plays with: cases, networks, observers, environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medrl.core import rng
from medrl.core.errors import DataError

from . import crossing, parts, sampler
from .agent import ColumnAgent, LineAgent, Sighted
from .config import KspaceConfig
from .domain import Data
from .env import KSpaceEnv
from .masks import apply_order, variable_density_order
from .models import ReconUNet
from .observer import CaseObserver
from .policies import observation_of
from .rewards import Quality
from .warmstart import StateCollector

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

SCALE_STATES = 256


@dataclass(frozen=True, eq=False)
class Game:
    """The parts of a policy run.

    Attributes:
        agent: The network that learns.
        network: The reward model, frozen; None without labels.
        recon: The reconstruction network, frozen, for acquisition.recon `unet`.
        observer: Training cases.
        held: Validation cases.
        quality: What the reward is of.
        weights: ``(N,)``, how often each training case is drawn; None is uniform.
        crossed: Crossed reward models, frozen; see `crossing`.
        dealt: Their part of each training patient.
    """

    agent: LineAgent
    network: nn.Module | None
    recon: ReconUNet | None
    observer: CaseObserver
    held: CaseObserver
    quality: Quality
    weights: Tensor | None
    crossed: nn.ModuleList | None = None
    dealt: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def build(cls, rt: Runtime, cfg: KspaceConfig, data: Data) -> Game:
        """Build everything with new weights; `fill` or a checkpoint brings the trained ones.

        Raises:
            DataError: The reward needs labels, and there are none.
        """
        if cfg.needs_labels and data.classes < 2:
            raise DataError(
                "reward", why="the dataset has no labels", do="--set reward.seg=0 --set reward.mode=delta"
            )
        manager = rt.job.manager
        network = recon = None
        if data.classes > 1:
            network = parts.segmenter(cfg, manager, classes=data.classes)
            rt.prepare(network.requires_grad_(requires_grad=False))
        if cfg.acquisition.recon == "unet":
            recon = parts.recon_network(cfg, manager)
            rt.prepare(recon.requires_grad_(requires_grad=False))
        cases = data.cases("train", cfg, rt.device)
        seen = parts.imaging(cfg, network, recon)
        observer = parts.observer(cfg, manager, cases, seen, classes=data.classes)
        crossed, dealt = None, {}
        if network is not None and cfg.seg.crossed:
            count = cfg.seg.crossed
            crossed = nn.ModuleList(parts.segmenter(cfg, manager, classes=data.classes) for _ in range(count))
            rt.prepare(crossed.requires_grad_(requires_grad=False))
            dealt = crossing.part_of_patients(data, cfg)
            observer = crossing.CrossedObserver(
                cases,
                seen,
                observer.features,
                crossed=[parts.imaging(cfg, each, recon) for each in crossed],
                part=crossing.parts_of_cases(data.info("train", cfg), dealt),
            )
        agent = parts.agent(cfg, manager, cases, observer.features)
        rt.prepare(agent)
        return cls(
            agent=agent,
            network=network,
            recon=recon,
            observer=observer,
            held=observer.on(data.cases("val", cfg, rt.device)),
            quality=parts.quality(cfg),
            weights=case_weights(cfg, data, cases.ids),
            crossed=crossed,
            dealt=dealt,
        )

    @property
    def policy(self) -> Sighted:
        """The agent with its eyes on the training cases."""
        return Sighted(self.agent, self.observer)

    @property
    def reads_features(self) -> bool:
        """Whether the agent reads features of columns."""
        return self.agent.needs != "image"

    def networks(self) -> dict[str, nn.Module]:
        """Everything with weights, by its name in checkpoints."""
        found: dict[str, nn.Module] = {"agent": self.agent}
        if self.network is not None:
            found["segmenter"] = self.network
        found |= {"crossed": self.crossed} if self.crossed is not None else {}
        return found | ({"recon": self.recon} if self.recon is not None else {})

    def fill(self, rt: Runtime, cfg: KspaceConfig, data: Data) -> None:
        """Bring in the trained reward model and reconstruction; train them first where none is named."""
        from . import stages

        found: dict[str, Path] = stages.obtain(rt, cfg, data)
        if self.network is not None:
            whole = parts.load_part(found["reward"], "segmenter", self.network, "inputs.reward")
            if self.crossed is None and self.quality.needs_labels:
                crossing.say_shared(whole.meta["patients"]["train"], data.slices("train").patients)
        for part, network in enumerate(self.crossed or ()):
            path = crossing.run_of(found["reward"], part)
            known = parts.load_part(path, "segmenter", network, "inputs.reward").meta["patients"]
            crossing.refuse_known(path, known["train"], self.dealt, part)
        if self.recon is not None:
            parts.load_part(found["recon"], "recon", self.recon, "inputs.recon")
        if rt.job.init_from is not None:
            parts.load_part(rt.job.init_from, "agent", self.agent, "--init-from")

    def ready(self) -> None:
        """Make the trained reward models as fast as they can be; call it when the weights are there."""
        self.observer.imaging.settle(self.network)
        if self.crossed is not None and isinstance(self.observer, crossing.CrossedObserver):
            for imaging, network in zip(self.observer.crossed, self.crossed, strict=True):
                imaging.settle(network)

    def environment(self, cfg: KspaceConfig, rt: Runtime) -> KSpaceEnv:
        """The environment of PPO."""
        low, high = cfg.budget.train
        return KSpaceEnv(
            self.observer,
            parts.reward(cfg),
            num_envs=cfg.ppo.envs,
            budgets=range(low, high + 1),
            same_budget=cfg.budget.shared,
            repeats=cfg.ppo.group,
            weights=self.weights,
            observe=("columns",) if self.reads_features else (),
            seed=rng.derive_seed(cfg.train.seed, "kspace", "environment", rt.rank),
        )

    def collector(self, cfg: KspaceConfig, rt: Runtime) -> StateCollector:
        """What collects the states of the warm start."""
        low, high = cfg.budget.train
        return StateCollector(
            self.observer,
            self.quality,
            batch=cfg.warm.chunk,
            budgets=range(low, high + 1),
            weights=self.weights,
            span=cfg.warm.span,
            keep=("columns", "pooled") if self.reads_features else (),
            seed=rng.derive_seed(cfg.train.seed, "kspace", "states", rt.rank),
        )

    def fit_scales_anew(self, cfg: KspaceConfig, rt: Runtime) -> None:
        """Standardise the features of a column agent by random states, where no warm start has any."""
        if not isinstance(self.agent, ColumnAgent):
            return
        cases = self.observer.cases
        generator = rng.torch_generator(cfg.train.seed, "kspace", "scales")
        low, high = cfg.budget.train
        case = torch.randint(len(cases), (SCALE_STATES,), generator=generator)
        budget = torch.randint(low, high + 1, (SCALE_STATES,), generator=generator)
        taken = (torch.rand(SCALE_STATES, generator=generator) * budget).long()
        initial = cases.rows("initial", case)
        free = cases.rows("possible", case) & ~initial
        mask = apply_order(initial, variable_density_order(free, generator), taken.to(cases.device))
        where = cases.device
        seen = observation_of(case.to(where), mask, (budget - taken).to(where), taken.to(where))
        self.agent.fit_scales(self.observer.seen(seen, self.agent.needs))
        self.share_scales(rt)

    def share_scales(self, rt: Runtime) -> None:
        """Give all ranks the scales of rank 0."""
        rt.ranks.exchange("scales", None)
        rt.ranks.broadcast(list(self.agent.buffers()))


def case_weights(cfg: KspaceConfig, data: Data, ids: tuple[str, ...]) -> Tensor | None:
    """How often each training case is drawn.

    Raises:
        DataError: A file of weights was made for other cases.
    """
    if cfg.sampler.kind == "uniform":
        return None
    cases = data.cases("train", cfg, torch.device("cpu"))
    if cfg.inputs.sampler is not None:
        return sampler.read_weights(cfg.inputs.sampler, cases).tensor()
    if tuple(cases.ids) != ids:
        raise DataError("sampler", why="the training cases changed while they were read")
    return sampler.make_weights(cases).tensor()
