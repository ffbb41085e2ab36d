"""All stages one after the other in one run folder, as often as the config says.

A stage is done when the record says so and its files are what it wrote (`medrl.core.stages`). A trained stage
is an ordinary run in ``stages/``: it saves, stops and resumes by itself, bit for bit. The run folder itself
holds a checkpoint after each stage, so that `medrl predict` and `medrl resume` know it at any time.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from medrl.core import rng
from medrl.core.config import Layer, resolve
from medrl.core.errors import ConfigError, MedrlError, RuntimeFault
from medrl.core.learned_reward import RewardNet
from medrl.core.runlog import RunFolder
from medrl.core.stages import Pipeline, path_hash

from . import corrector_training, pair_stage, parts, pretrain, reward_training, testing, train
from .config import Rl4segConfig
from .domains import Domains, load_domains
from .stages import Results, Stage, inputs_of, outputs_of, plan_stages, stage_job

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
_BEAT_S = 20.0
_log = logging.getLogger("medrl.rl4seg")


def run(job: TrainJob) -> None:
    """Do the stages of a run folder: all that are left, or with `stage` the next one of that kind."""
    job = with_phantoms(job)
    cfg: Rl4segConfig = job.config
    if cfg.alone:
        run_alone(job)
        return
    # Whatever is wrong with data, inputs and networks is found before a run folder is made.
    data, results = load_domains(cfg, job.manager), Results.given(cfg)
    product = Product.build(cfg, job.manager, data)
    parts.rules_of(cfg, data.label_names)
    # A trial run shortens every stage by train.max_steps; the loop itself is always whole.
    with replace(job, fast_dev_run=False).runtime() as rt:
        Loop(rt, job, data, results).run(product)


def with_phantoms(job: TrainJob) -> TrainJob:
    """Give a trial run for which no data were named synthetic echocardiograms instead of what it got."""
    if not job.fast_dev_run or job.resolved.origins.get("data.root") != "--fast-dev-run":
        return job
    from medrl.core.phantoms.echo import write_echo

    folder: Path = job.config.data.root.parent
    source = write_echo(folder / "echo_source", cases=10, test_cases=0, seed=1)
    target = write_echo(folder / "echo_target", cases=10, test_cases=4, seed=2, shift=0.5)
    values = job.resolved.values()
    values["data"] |= {"root": str(source), "layout": "auto"}
    values["target"] |= {"root": str(target), "layout": "auto"}
    return replace(job, resolved=resolve(Rl4segConfig, [Layer("--fast-dev-run", values)]))


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


class Loop:
    """The loop over the stages of one run folder.

    Args:
        rt: Runtime of the run folder; each stage opens its own inside.
        job: The job with what the command line gave.
        data: Both domains.
        results: What `inputs` brings.
    """

    def __init__(self, rt: Runtime, job: TrainJob, data: Domains, results: Results) -> None:
        self.rt, self.job = rt, job
        self.cfg: Rl4segConfig = job.config
        self.root = rt.run.dir
        self.pipeline = Pipeline(self.root) if rt.is_main else None
        self.stages = plan_stages(self.cfg)
        self.data, self.results = data, results
        self.digest = data.digest()
        self.validity: dict[int, float] = {}

    def run(self, product: Product) -> None:
        """Do what is left to do.

        Args:
            product: What the checkpoint of the run folder holds.
        """
        rt, cfg = self.rt, self.cfg
        rt.prepare(*product.named().values())
        rt.checkpoint.register(**product.named())
        done_before = rt.checkpoint.resume()
        self._describe(0)
        if not done_before:
            rt.checkpoint.save(0)
        last = self._last_stage()
        for step in rt.steps(0, last.number):
            stage = self.stages[step - 1]
            started = time.monotonic()
            with rng.isolated(rng.derive_seed(cfg.train.seed, "stage", stage.name)):
                ran = self._do(stage)
            self.results.add(stage, [self.root / place for place in outputs_of(stage, cfg)], cfg)
            self._take(product)
            facts = self._facts(stage)
            if ran or step > done_before:
                self._describe(step)
                rt.log(step, stage=stage.name, seconds=round(time.monotonic() - started, 1), **facts)
                rt.checkpoint.save(step)
        if last is self.stages[-1]:
            _log.info("all %d stages are done; the result is iteration_%d", len(self.stages), self._chosen())

    # -- which stages ------------------------------------------------------------------------------

    def _last_stage(self) -> Stage:
        """The stage up to which to go: the last, or the first of the kind asked for that is not done.

        Raises:
            ConfigError: The loop has no such stage, or one before it is not done.
        """
        kind = self.cfg.stage
        if kind == "all":
            return self.stages[-1]
        wanted = [stage for stage in self.stages if stage.kind == kind]
        if not wanted:
            names = ", ".join(dict.fromkeys(stage.kind for stage in self.stages))
            raise ConfigError(f"--stage {kind}", why=f"this config has no such stage, only {names}")
        done = self._done()
        open_ones = [stage for stage in wanted if stage.name not in done]
        if not open_ones:
            _log.info("stage %s is done in every iteration", kind)
        chosen = open_ones[0] if open_ones else wanted[-1]
        missing = [stage for stage in self.stages[: chosen.number - 1] if stage.name not in done]
        if missing:
            raise ConfigError(
                f"--stage {kind}",
                why=f"{chosen.name} needs {missing[0].name}, which is not done",
                do=f"--stage {missing[0].kind} first, or --stage all",
            )
        return chosen

    def _done(self) -> set[str]:
        done = set()
        if self.pipeline is not None:
            done = {name for name, status in self.pipeline.status().items() if status.state == "done"}
        return set(self.rt.ranks.exchange("stages done", done)[0])

    # -- one stage ---------------------------------------------------------------------------------

    def _do(self, stage: Stage) -> bool:
        """Do a stage on all ranks unless it is done; rank 0 decides and keeps the record."""
        ranks = self.rt.ranks
        inputs = inputs_of(stage, self.results, self.cfg)
        if self.pipeline is None:
            answer = ranks.exchange("stage", None)[0]
            if isinstance(answer, MedrlError):
                raise answer
            if answer:
                self._work(stage, inputs)
            return bool(answer)
        told = False

        def go() -> None:
            nonlocal told
            told = True
            ranks.exchange("stage", True)
            self._work(stage, inputs)

        try:
            ran = self.pipeline.stage(
                stage.name, inputs=self._decides(inputs), outputs=outputs_of(stage, self.cfg), run=go
            )
        except MedrlError as error:
            if not told:
                ranks.exchange("stage", error)
            raise
        if not told:
            ranks.exchange("stage", False)
        return ran

    def _decides(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides what a stage writes: config, images, files of other stages."""
        return {
            "config": self.job.resolved.hash,
            "images": self.digest,
            "rules": Path(self.cfg.rules) if Path(self.cfg.rules).is_file() else self.cfg.rules,
            **{name: list(path) if isinstance(path, tuple) else path for name, path in inputs.items()},
        }

    def _work(self, stage: Stage, inputs: Mapping[str, Any]) -> None:
        """Do a stage; every rank comes here."""
        folder = self.root / "stages" / stage.name
        self._clear_if_stale(folder, inputs)
        job = stage_job(self.job, stage, inputs, folder)
        if stage.kind in FITS:
            with job.runtime() as rt:
                FITS[stage.kind](rt, job.config, self.data)
        elif stage.kind == "pairs":
            self._alone(lambda beat: pair_stage.write(job, self.data, folder, self.rt.device, beat))
        else:
            self._alone(self._test)

    def _clear_if_stale(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        """Remove what a stage wrote from other inputs; what it wrote from these is continued."""
        failure: MedrlError | None = None
        if self.rt.is_main:
            try:
                wanted = {
                    name: [path_hash(item) for item in (path if isinstance(path, tuple) else (path,))]
                    for name, path in sorted(inputs.items())
                }
                note = folder.with_suffix(".inputs.json")
                known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
                if folder.exists() and known != wanted:
                    _log.info("%s was made from other inputs; it is made again", folder.name)
                    shutil.rmtree(folder)
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            except MedrlError as error:
                failure = error
        self.rt.ranks.raise_together("preparing the stage", failure)

    def _alone(self, work: Callable[[Callable[[], None]], object]) -> None:
        """Let rank 0 work while the others wait, however long it takes.

        Raises:
            Interrupted: A signal arrived; the work begins anew when the run is resumed.
        """
        rt = self.rt
        if rt.is_main:
            news = self._work_and_tell(work)
        else:
            news = "working"
            while news == "working":
                news = rt.ranks.exchange("waiting", "stop" if rt.stop_requested else "")[0]
        if news == "stop":
            rt.obey_stop()
        if news != "done":
            raise RuntimeFault("the main rank", why="it could not finish its part", do="its message says why")

    def _work_and_tell(self, work: Callable[[Callable[[], None]], object]) -> str:
        """Work on rank 0, and tell the others every now and then that it goes on."""
        ranks, last = self.rt.ranks, time.monotonic()

        def beat() -> None:
            nonlocal last
            stop = self.rt.stop_requested
            if ranks.world_size > 1 and time.monotonic() - last > _BEAT_S:
                last = time.monotonic()
                stop = "stop" in ranks.exchange("waiting", "working")[1:] or stop
            if stop:
                raise _Stop

        news = "failed"
        try:
            work(beat)
            news = "done"
        except _Stop:
            news = "stop"
        finally:
            ranks.exchange("waiting", news)
        return news

    # -- what comes of it --------------------------------------------------------------------------

    def _take(self, product: Product) -> None:
        """Fill what the run folder's own checkpoint holds with what the stages have made so far."""
        actor = self._final()
        if actor is not None:
            parts.load_part(actor, "actor", product.actor, "actor")
        if product.reward is not None and self.results.reward is not None:
            parts.load_part(self.results.reward, "reward", product.reward, "reward")

    def _final(self) -> Path | None:
        """The checkpoint of the actor that is the result so far."""
        trained = {number: path for number, path in self.results.actors.items() if number > 0}
        if not trained:
            return self.results.actors.get(0) or self.results.source
        return trained[self._chosen()]

    def _chosen(self) -> int:
        """The iteration that is the result: the last, or the one with most valid masks (ties: the later)."""
        numbers = [number for number in self.results.actors if number > 0]
        if self.cfg.loop.final == "last":
            return max(numbers)
        return max(numbers, key=lambda number: (self.validity.get(number, -1.0), number))

    def _facts(self, stage: Stage) -> dict[str, Any]:
        """The last validation of a stage, or the numbers of the test, for the log of the loop."""
        facts: dict[str, Any] = {}
        if self.rt.is_main and stage.kind in FITS:
            shown = ("val_", "start_", "alarm_", "corrupted_")
            for record in RunFolder.open(self.root / "stages" / stage.name, lock=False).records():
                facts |= {key: value for key, value in record.items() if key.startswith(shown)}
        elif self.rt.is_main and stage.kind == "test":
            content = json.loads((self.root / testing.FILE).read_text(encoding="utf-8"))
            facts = testing.headline(content["summary"][content["final"]])
        facts = self.rt.ranks.exchange("facts of the stage", facts)[0]
        if stage.kind == "ppo":
            self.validity[stage.iteration] = float(facts.get("val_validity", -1.0))
        return {f"{stage.kind}/{name}": value for name, value in facts.items()}

    def _describe(self, step: int) -> None:
        """Say in the meta of the checkpoint what the actor in it has seen."""
        self.rt.checkpoint.describe(
            **self.data.facts(), stages_done=step, reward_ready=self.results.reward is not None
        )

    def _test(self, beat: Callable[[], None]) -> None:
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
            final=f"iteration_{self._chosen()}",
            device=self.rt.device,
            beat=beat,
        )


class _Stop(Exception):
    """A signal arrived while rank 0 was at work."""


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
