"""All stages one after the other in one run folder, as often as the config says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from medrl.core.adaptation.loop import Beat
from medrl.core.adaptation.loop import Loop as StageLoop
from medrl.core.adaptation.stages import Files, Stage, folder_of
from medrl.core.errors import ConfigError
from medrl.core.executors.stages import run_stages
from medrl.core.learned_reward import RewardNet

from . import corrector_training, pair_stage, parts, pretrain, reward_training, testing, train
from .config import Rl4segConfig
from .domains import Domains, load_domains
from .stages import Results, inputs_of, outputs_of, plan_stages

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob
    from medrl.core.manager import PluginManager
    from medrl.core.runtime import Runtime

FITS: Mapping[str, Callable[[Any, Rl4segConfig, Domains], None]] = {
    "source": pretrain.fit,
    "style": pretrain.fit,
    "corrector": corrector_training.fit,
    "reward": reward_training.fit,
    "ppo": train.fit,
}
_log = logging.getLogger("medrl.rl4seg")


def run(job: TrainJob) -> None:
    """Do the stages of a run folder: all that are left, or with `stage` the next one of that kind."""
    cfg: Rl4segConfig = job.config
    if cfg.alone:
        run_alone(job)
        return
    if job.stage_executor is not None and cfg.stage == "all":
        run_stages(job, plan_stages(cfg), job.stage_executor)
        return
    # Whatever is wrong with data, inputs and networks is found before a run folder is made.
    data, results = load_domains(cfg, job.manager), Results.given(cfg)
    product = Product.build(cfg, job.manager, data)
    parts.rules_of(cfg, data.label_names)
    # A trial run shortens every stage by train.max_steps; the loop itself is always whole.
    with replace(job, fast_dev_run=False).runtime() as rt:
        loop = Loop(rt, job, data, results, product)
        if loop.run(product.named()):
            _log.info("all %d stages are done; the result is iteration_%d", len(loop.stages), loop.chosen())


def run_alone(job: TrainJob) -> None:
    """Do one training stage in the run folder itself.

    Raises:
        ConfigError: The stage trains nothing.
    """
    cfg: Rl4segConfig = job.config
    if cfg.stage not in FITS:
        raise ConfigError(
            f"stage {cfg.stage}",
            why="it cannot be done alone",
            do=f"choose one of {', '.join(FITS)}, or leave out --set alone=true",
        )
    data = load_domains(cfg, job.manager, stage=cfg.stage)
    with job.runtime() as rt:
        FITS[cfg.stage](rt, cfg, data)


class Loop(StageLoop):
    """The loop over the stages of one run folder.

    Args:
        rt: Runtime of the run folder; each stage opens its own inside.
        job: The job with what the command line gave.
        data: Both domains.
        results: What `inputs` brings.
        product: What the checkpoint of the run folder holds.
    """

    def __init__(self, rt: Runtime, job: TrainJob, data: Domains, results: Results, product: Product) -> None:
        self.cfg: Rl4segConfig = job.config
        super().__init__(rt, job, plan_stages(self.cfg))
        self.data, self.results, self.product = data, results, product
        self.digest = data.digest()
        self.validity: dict[int, float] = {}

    def inputs_of(self, stage: Stage) -> Files:
        """The files that a stage reads."""
        return inputs_of(stage, self.results, self.cfg)

    def outputs_of(self, stage: Stage) -> list[Path]:
        """What a stage writes."""
        return outputs_of(stage, self.cfg)

    def decides(self) -> dict[str, Any]:
        """Images and rules."""
        rules = Path(self.cfg.rules) if Path(self.cfg.rules).is_file() else self.cfg.rules
        return {"images": self.digest, "rules": rules}

    def work(self, stage: Stage, job: TrainJob) -> None:
        """Do a stage; every rank comes here."""
        if stage.kind in FITS:
            with job.runtime() as rt:
                FITS[stage.kind](rt, job.config, self.data)
        elif stage.kind == "pairs":
            folder = self.root / folder_of(stage)
            self.alone(lambda beat: pair_stage.write(job, self.data, folder, self.rt.device, beat))
        else:
            self.alone(self._test)

    def record(self, stage: Stage) -> None:
        """Note what a stage has made, and fill what the run folder's own checkpoint holds with it."""
        self.results.add(stage, [self.root / place for place in self.outputs_of(stage)], self.cfg)
        actor, reward = self._final(), self.results.reward
        if actor is not None:
            parts.load_part(actor, "actor", self.product.actor, "actor")
        if self.product.reward is not None and reward is not None:
            parts.load_part(reward, "reward", self.product.reward, "reward")

    def facts(self, stage: Stage) -> dict[str, Any]:
        """The last validation of a stage, or the numbers of the test, for the log of the loop."""
        facts: dict[str, Any] = {}
        if self.rt.is_main and stage.kind in FITS:
            facts = self.numbers_of(stage)
        elif self.rt.is_main and stage.kind == "test":
            content = json.loads((self.root / testing.FILE).read_text(encoding="utf-8"))
            facts = testing.headline(content["summary"][content["final"]])
        facts = self.rt.ranks.exchange("facts of the stage", facts)[0]
        if stage.kind == "ppo":
            self.validity[stage.iteration] = float(facts.get("val_validity", -1.0))
        return {f"{stage.kind}/{name}": value for name, value in facts.items()}

    def describe(self, step: int) -> None:
        """Say in the meta of the checkpoint what the actor in it has seen."""
        self.rt.checkpoint.describe(
            **self.data.facts(), stages_done=step, reward_ready=self.results.reward is not None
        )

    def chosen(self) -> int:
        """The iteration that is the result: the last, or the one with most valid masks (ties: the later)."""
        numbers = [number for number in self.results.actors if number > 0]
        if self.cfg.loop.final == "last":
            return max(numbers)
        return max(numbers, key=lambda number: (self.validity.get(number, -1.0), number))

    def _final(self) -> Path | None:
        """The checkpoint of the actor that is the result so far."""
        trained = {number: path for number, path in self.results.actors.items() if number > 0}
        if not trained:
            return self.results.actors.get(0) or self.results.source
        return trained[self.chosen()]

    def _test(self, beat: Beat) -> None:
        """Score the actors of all iterations on the target test images."""
        found: dict[str, Path | None] = {"source": self.results.source, "style": self.results.style}
        trained = {number: path for number, path in self.results.actors.items() if number > 0}
        found |= {f"iteration_{number}": path for number, path in sorted(trained.items())}
        testing.write(
            self.root / testing.FILE,
            self.cfg,
            self.job.manager,
            self.data,
            {name: path for name, path in found.items() if path is not None},
            final=f"iteration_{self.chosen()}",
            device=self.rt.device,
            beat=beat,
        )


@dataclass(frozen=True, eq=False)
class Product:
    """What the checkpoint of a loop holds: the network of the actor, and the reward net if there is one."""

    actor: nn.Module
    reward: RewardNet | None

    @classmethod
    def build(cls, cfg: Rl4segConfig, manager: PluginManager, data: Domains) -> Product:
        """Build both with new weights."""
        sizes = {"channels": data.channels, "classes": data.classes}
        net = parts.reward_net(cfg, manager, **sizes) if cfg.learns_reward else None
        return cls(parts.actor_network(cfg, manager, **sizes), net)

    def named(self) -> dict[str, nn.Module]:
        """Both by their names in the checkpoint."""
        found: dict[str, nn.Module] = {"actor": self.actor}
        return found | ({"reward": self.reward} if self.reward is not None else {})
