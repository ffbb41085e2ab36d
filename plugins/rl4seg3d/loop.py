"""All stages one after the other in one run folder, as often as the config says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from medrl.core.adaptation.loop import Beat
from medrl.core.adaptation.loop import Loop as StageLoop
from medrl.core.adaptation.parts import rules_of
from medrl.core.adaptation.stages import Files, Stage, folder_of
from medrl.core.errors import ConfigError
from medrl.core.validity.temporal import load_temporal_rules

from . import corrector_training, pair_stage, parts, pretrain, reward_training, slurm, testing, train
from .config import Rl4seg3dConfig
from .domains import Domains, load_domains
from .stages import NETS, Results, inputs_of, outputs_of, plan_stages

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob
    from medrl.core.manager import PluginManager
    from medrl.core.runtime import Runtime

FITS: Mapping[str, Callable[[Any, Rl4seg3dConfig, Domains], None]] = {
    "source": pretrain.fit,
    "style": pretrain.fit,
    "corrector": corrector_training.fit,
    "anatomical": reward_training.fit,
    "landmark": reward_training.fit,
    "ppo": train.fit,
}
_log = logging.getLogger("medrl.rl4seg3d")


def run(job: TrainJob) -> None:
    """Do the stages of a run folder: all that are left, or with `stage` the next one of that kind."""
    cfg: Rl4seg3dConfig = job.config
    if cfg.alone:
        run_alone(job)
        return
    if (job.stage_executor is not None or cfg.slurm.mode != "off") and cfg.stage == "all":
        slurm.run(job)
        return
    # Whatever is wrong with data, inputs and networks is found before a run folder is made.
    data, results = load_domains(cfg, job.manager), Results.given(cfg)
    product = build_product(cfg, job.manager, data)
    rules_of(cfg.rules, data.label_names)
    load_temporal_rules(cfg.temporal_rules)
    # A trial run shortens every stage by train.max_steps; the loop itself is always whole.
    with replace(job, fast_dev_run=False).runtime() as rt:
        loop = Loop(rt, job, data, results, product)
        if loop.run(product):
            _log.info("all %d stages are done; the result is iteration_%d", len(loop.stages), loop.chosen())


def run_alone(job: TrainJob) -> None:
    """Do one training stage in the run folder itself.

    Raises:
        ConfigError: The stage trains nothing.
    """
    cfg: Rl4seg3dConfig = job.config
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
        product: What the checkpoint of the run folder holds, by name.
    """

    def __init__(
        self,
        rt: Runtime,
        job: TrainJob,
        data: Domains,
        results: Results,
        product: Mapping[str, nn.Module],
    ) -> None:
        self.cfg: Rl4seg3dConfig = job.config
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
        """Sequences and rules."""
        rules = {name: Path(getattr(self.cfg, name)) for name in ("rules", "temporal_rules")}
        return {
            "sequences": self.digest,
            **{name: path if path.is_file() else str(path) for name, path in rules.items()},
        }

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
        actor = self._final()
        if actor is not None:
            parts.load_part(actor, "actor", self.product["actor"], "actor")
        for name in self.ready():
            parts.load_part(self.results.made[name], "reward", self.product[f"reward_{name}"], name)

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
        self.rt.checkpoint.describe(**self.data.facts(), stages_done=step, rewards_ready=self.ready())

    def ready(self) -> list[str]:
        """Reward nets that are trained."""
        return [name for name in NETS if f"reward_{name}" in self.product and name in self.results.made]

    def chosen(self) -> int:
        """The iteration that is the result: the last, or the one with most valid windows (ties: later)."""
        numbers = list(self.results.trained())
        if self.cfg.loop.final == "last":
            return max(numbers)
        return max(numbers, key=lambda number: (self.validity.get(number, -1.0), number))

    def _final(self) -> Path | None:
        """The checkpoint of the actor that is the result so far."""
        trained = self.results.trained()
        if not trained:
            return self.results.actors.get(0) or self.results.made.get("source")
        return trained[self.chosen()]

    def _test(self, beat: Beat) -> None:
        """Score the actors of all iterations on the target test sequences."""
        found = {name: self.results.made.get(name) for name in ("source", "style")}
        found |= {f"iteration_{number}": path for number, path in self.results.trained().items()}
        testing.write(
            self.root / testing.FILE,
            self.cfg,
            self.job.manager,
            self.data,
            {name: path for name, path in found.items() if path is not None},
            final=f"iteration_{self.chosen()}",
            nets={name: self.results.made[name] for name in self.ready()},
            device=self.rt.device,
            beat=beat,
        )


def build_product(cfg: Rl4seg3dConfig, manager: PluginManager, data: Domains) -> dict[str, nn.Module]:
    """What the checkpoint of a loop holds, with new weights: the actor's network, and the reward nets."""
    sizes = {"channels": data.channels, "classes": data.classes}
    found: dict[str, nn.Module] = {"actor": parts.actor_network(cfg, manager, **sizes)}
    for name in cfg.reward.nets if cfg.learns_reward else ():
        found[f"reward_{name}"] = parts.reward_net(cfg, manager, name, **sizes)
    return found
