"""Small training runs of a plugin on synthetic data, in this process and in two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from medrl.core.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from medrl.core.config import Layer, nest, presets, resolve_method
from medrl.core.config.layers import flatten
from medrl.core.errors import Interrupted, RuntimeFault
from medrl.core.jobs import ConfigOption, PredictJob, TrainJob
from medrl.core.manager import LoadedPlugin, PluginManager
from medrl.core.predicting import PredictOutcome
from medrl.core.testing.findings import NotChecked
from medrl.core.testing.synthetic import write_trial

STEPS = 6
RANKS_TIMEOUT_S = 300


class Trial:
    """Runs of one plugin; each is trained once and remembered.

    Args:
        plugin: The plugin.
        manager: That loaded it.
        folder: Where data and runs go.
        values: Nested config values over those of a trial; with ``data.root`` nothing synthetic is written.
    """

    def __init__(
        self, plugin: LoadedPlugin, manager: PluginManager, folder: Path, values: Mapping[str, Any]
    ) -> None:
        self.plugin, self.manager, self.folder = plugin, manager, folder
        self.given = flatten(values)
        self._failed = False
        self._stopped: list[int] = []
        self._steps: dict[str, int] = {}

    @property
    def predicts(self) -> bool:
        """Whether there is something to predict with."""
        return "predict" in self.plugin.commands.provided()

    def require_training(self) -> None:
        """Go on only if there is something to train and its straight run has not failed before.

        Raises:
            NotChecked: Otherwise.
        """
        if "train" not in self.plugin.commands.provided():
            raise NotChecked("it has no train command")
        if not self.plugin.info.config:
            raise NotChecked("it has no config model")
        if self._failed:
            raise NotChecked("its training run failed, as said above")

    @cached_property
    def data(self) -> dict[str, Any]:
        """Dotted config values that name the data; the data are written when they are first asked for."""
        if "data.root" in self.given:
            return {}
        folder = self.folder / "data"
        if self.plugin.info.trial:
            return write_trial(self.plugin.info, folder)
        from medrl.core.phantoms.prostate import write_prostate

        # One case for training: whether a loss falls does not depend on which case is drawn.
        write_prostate(folder, cases=2, test_cases=3, shape=(32, 32, 12))
        return {"data.root": str(folder), "data.folds": 2}

    @property
    def inputs(self) -> Path:
        """Images to predict: those for testing, or all."""
        root = Path(str({**self.data, **self.given}["data.root"]))
        return next((root / name for name in ("imagesTs", "imagesTr") if (root / name).is_dir()), root)

    def values(self, steps: int) -> dict[str, Any]:
        """Dotted config values of a run of so many steps."""
        return {
            "train.max_steps": steps,
            "train.batch_size": 1,
            "train.validate_every": STEPS,
            "train.checkpoint_every": STEPS,
            "train.device": "cpu",
            "train.timeout_s": 120.0,
            **self.data,
            **self.given,
        }

    @cached_property
    def straight(self) -> Path:
        """A run without interruption."""
        self._failed = True
        run = self.train("straight")
        self._failed = False
        return run

    @cached_property
    def again(self) -> Path:
        """The same run once more."""
        return self.train("again")

    @cached_property
    def resumed(self) -> tuple[Path, list[int]]:
        """The same run, stopped by signals and resumed; and after how many steps of all it was stopped.

        It is stopped in its first stage, and again in its last one where there are several.
        """
        whole = self._steps.get(self.straight.name, 0)
        moments = [STEPS // 2]
        if whole >= 2 * STEPS:
            moments.append(whole - STEPS // 2)
        run = self.train("resumed", stops=moments)
        return run, self._stopped

    def train(self, name: str, *, stops: Sequence[int] = ()) -> Path:
        """Train into a folder of this name and return it.

        Args:
            name: Of the run.
            stops: Send this process a SIGTERM after so many steps, those of all stages together; then resume.
        """
        self._stopped = []
        for moment in stops:
            with suppress(Interrupted):
                self._run(name, moment, resume="must" if self._stopped else "never")
        if not stops or self._stopped:
            self._run(name, 0, resume="must" if self._stopped else "never")
        return self.folder / name

    def train_ranks(self, name: str, ranks: int = 2) -> Path:
        """Train in several processes over gloo and return the run folder.

        Raises:
            RuntimeFault: The command failed; its last lines are in the message.
        """
        run = self.folder / name
        command = [sys.executable, "-m", "medrl.cli", "--plain", "train", self.plugin.name, "-o", str(run)]
        command += ["--devices", str(ranks), "--device", "cpu", *self._preset_flags()]
        for key, value in self.values(2).items():
            command += ["--set", f"{key}={_plain(value)}"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
        }
        if self.manager.policy.path is not None:
            environment["MEDRL_PLUGINS"] = str(self.manager.policy.path.resolve())
        try:
            done = subprocess.run(  # noqa: S603 - this interpreter, with arguments of our own
                command,
                capture_output=True,
                text=True,
                env=environment,
                timeout=RANKS_TIMEOUT_S,
                check=False,
                cwd=self.folder,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeFault(
                f"{ranks} ranks", why=f"nothing came of it within {RANKS_TIMEOUT_S} s", do=_RANKS_ADVICE
            ) from error
        if done.returncode != 0:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if "error:" in line] or lines[-1:]
            why = errors[0] if errors else f"exit code {done.returncode}"
            raise RuntimeFault(f"{ranks} ranks", why=why, do=_RANKS_ADVICE)
        return run

    def predict(self, run: Path, output: Path) -> PredictOutcome:
        """Predict the test images with a run."""
        command = self.plugin.commands.predict
        job = PredictJob(
            method=self.plugin.name,
            inputs=self.inputs,
            output=output,
            checkpoints=[find_checkpoint(run)],
            manager=self.manager,
            device="cpu",
        )
        outcome = _invoke(command, job)
        if not isinstance(outcome, PredictOutcome):
            raise RuntimeFault(
                "the predict command",
                why=f"it returned {type(outcome).__name__}, not a PredictOutcome",
                do="return job.run(load)",
            )
        return outcome

    def _run(self, name: str, stop_after: int, *, resume: str = "never") -> None:
        layers = [Layer("check", nest(self.values(STEPS)))]
        resolved = resolve_method(self.manager, self.plugin.name, preset=self._preset(), layers=layers)
        stopping = False

        def progress(step: int, total: int, _metrics: Mapping[str, Any]) -> None:
            nonlocal stopping
            self._steps[name] = self._steps.get(name, 0) + 1
            if stop_after and not stopping and self._steps[name] >= stop_after and step < total:
                stopping = True
                self._stopped.append(self._steps[name])
                signal.raise_signal(signal.SIGTERM)

        job = TrainJob(
            method=self.plugin.name,
            resolved=resolved,
            run_dir=self.folder / name,
            manager=self.manager,
            resume=resume,
            command=("medrl", "plugins", "check", self.plugin.name),
            extra={"progress": progress},
        )
        _invoke(self.plugin.commands.train, job)

    def _preset(self) -> str | None:
        return "smoke" if "smoke" in presets(self.manager, self.plugin.name) else None

    def _preset_flags(self) -> list[str]:
        return ["--preset", "smoke"] if self._preset() else []


_RANKS_ADVICE = "build the same modules on every rank, and decide every branch by values from rt.reduce"


def logs(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records of a run and of each of its stages, by what stands before a name in it."""
    return {
        "" if file.parent == run else f"{file.parent.relative_to(run).as_posix()}: ": [
            json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()
        ]
        for file in sorted(run.rglob("metrics.jsonl"))
    }


def newest(run: Path, method: str) -> Checkpoint:
    """Load the last checkpoint of a run."""
    return load_checkpoint(find_checkpoint(run, "last"), method=method)


def _invoke(command: click.Command | None, job: Any) -> Any:
    """Call a command of a method as the command line does, with its own options at their defaults."""
    if command is None or command.callback is None:
        raise RuntimeFault("the command", why="it has no function")
    own = [item.name for item in command.params if not isinstance(item, ConfigOption)]
    with command.make_context(command.name, []) as context:
        values = {name: value for name, value in context.params.items() if name in own}
        return context.invoke(command.callback, job, **values)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
