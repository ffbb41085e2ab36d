"""``medrl predict [METHOD]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from medrl.cli.completing import complete_runs
from medrl.cli.console import console, counted
from medrl.cli.method_command import Call, MethodCommand, existing
from medrl.cli.options import (
    ANY_PATH,
    FILE,
    POSITIVE,
    ListType,
    PartType,
    compute_options,
)
from medrl.cli.progress import case_progress
from medrl.cli.runfiles import method_of_model, require_plugin, run_config, run_folders
from medrl.cli.session import manager_of
from medrl.core.errors import EXIT_DATA, EXIT_OK, CheckpointError, ConfigError, PluginError
from medrl.core.jobs import executor_options


class Predict(MethodCommand):
    """Predicts with the checkpoints of one run, or the mean of several folds."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; where the method of the model is not installed, say so first."""
        try:
            return super().parse_args(ctx, args)
        except (ConfigError, PluginError):
            if not ctx.resilient_parsing:
                self._require_plugin(ctx, args)
            raise

    def _require_plugin(self, ctx: click.Context, args: list[str]) -> None:
        try:
            models = self._peek(ctx, args)[0].get("model") or ()
        except click.UsageError:
            return
        for model in models:
            folder = Path(model)
            if folder.exists() and not _is_foreign(folder):
                require_plugin(manager_of(ctx), method_of_model(model_folders([folder], ())[0]), folder)

    def find_method(self, ctx: click.Context, values: dict[str, Any]) -> str:
        """Take the method from the checkpoint."""
        models = values.get("model") or ()
        if not models:
            raise ConfigError("--model is missing", why="a run folder or checkpoint", do="medrl runs list")
        folders = model_folders([Path(model) for model in models], values.get("folds") or ())
        return method_of_model(folders[0])

    def work(self, call: Call) -> int:
        """Find the checkpoints, hand the job to the method and tell what came of it."""
        shared = {**call.shared, **_paths(call.shared)}
        folders = model_folders(shared["model"], shared["folds"] or ())
        for folder in folders:
            if _is_foreign(folder):
                continue  # weights of another program: the method says whether it can use them
            found = method_of_model(folder)
            if found != call.method:
                raise CheckpointError(
                    f"model {folder}",
                    why=f"it was trained by '{found}', not by '{call.method}'",
                    do=f"medrl predict {found} …, or leave the method out",
                )
        if shared["parts"] is not None:
            from medrl.cli.predict_parts import do_parts

            return do_parts(call, self.params, shared)
        if shared["executor"] or shared["jobs"] or shared["resource"]:
            raise ConfigError(
                "--executor, --jobs and --resource", why="there is only one part", do="add --parts N"
            )
        console().loading()
        from medrl.core.checkpoint import find_checkpoint
        from medrl.core.jobs import PredictJob

        checkpoints = [find_checkpoint(folder) for folder in folders]
        with case_progress() as show:
            job = PredictJob(
                method=call.method,
                inputs=shared["input"],
                output=shared["output"],
                checkpoints=checkpoints,
                manager=call.manager,
                tta=shared["tta"],
                overlap=shared["overlap"],
                device=shared["device"],
                threads=shared["threads"],
                precision=shared["precision"],
                save_probabilities=shared["save_probabilities"],
                save_uncertainty=shared["save_uncertainty"],
                preview=shared["preview"],
                statistics=shared["statistics"],
                continue_=shared["continue_"],
                part=shared["part"],
                max_memory_gb=shared["max_memory"],
                say=console().say,
                report=shared["report"],
                command=("medrl", *console().arguments),
                progress=show,
                extra=call.extra,
            )
            outcome = call.start(job)
        return say_outcome(outcome, shared["output"])


def _paths(shared: dict[str, Any]) -> dict[str, Path]:
    """Return input and output, given as options or as the words after METHOD.

    Raises:
        ConfigError: One is missing, given twice, or does not exist.
    """
    words = list(shared["paths"])
    if len(words) > 2:
        raise ConfigError(f"'{words[2]}'", why="only IN and OUT are expected after METHOD")
    found: dict[str, Path] = {}
    for name, option in (("input", "-i"), ("output", "-o")):
        given = shared[name]
        word = words.pop(0) if words and given is None else None
        path = given if given is not None else word
        if path is None:
            raise ConfigError(f"{option} is missing", why=f"the {name}", do="medrl predict METHOD IN OUT")
        found[name] = path
    if words:
        raise ConfigError(f"'{words[0]}'", why="-i and -o already say where", do="leave it out")
    existing(found["input"], option="-i")
    if found["output"].is_file() and not found["output"].name.lower().endswith((".nii", ".nii.gz")):
        raise ConfigError(f"-o {found['output']}", why="this is a file", do="name a folder")
    return found


def _is_foreign(model: Path) -> bool:
    """Whether a file is no checkpoint of medrl, such as the weights of another program."""
    if not model.is_file():
        return False
    console().loading()
    from medrl.core.checkpoint import is_checkpoint

    return not is_checkpoint(model)


def say_outcome(outcome: Any, output: Path) -> int:
    """Tell which cases are done and which failed; return the exit code."""
    screen = console()
    done, failed = list(getattr(outcome, "done", ())), getattr(outcome, "failed", {})
    for case, why in dict(failed).items():
        text = str(why).removeprefix(f"case {case}: ")
        screen.line(f"{screen.style('failed', fg='red')}: case {case}: {text}")
    skipped = len(getattr(outcome, "skipped", ()))
    parts = [f"{counted(len(done), 'case')} in {output}"]
    parts += [f"{skipped} finished before"] * bool(skipped) + [f"{len(failed)} failed"] * bool(failed)
    screen.say(", ".join(parts))
    report = getattr(outcome, "report", None)
    if report is not None:
        screen.say(f"report: {report}")
    return EXIT_DATA if failed else EXIT_OK


def model_folders(models: Sequence[Path], folds: Sequence[int]) -> list[Path]:
    """Return the run folders or checkpoints that are averaged.

    A folder without checkpoints of its own that holds runs, one a fold, stands for those runs; `folds`
    chooses among them.

    Raises:
        ConfigError: A path does not exist, or a fold is missing.
    """
    found: list[Path] = []
    for model in models:
        if not model.exists():
            raise ConfigError(f"--model {model}", why="no such file or folder", do="medrl runs list")
        own = model.is_file() or any(model.glob("*.pt")) or any((model / "checkpoints").glob("*.pt"))
        inner = [] if own else run_folders(model)
        found += inner or [model]
    if not folds:
        return found
    by_fold: dict[int, list[Path]] = {}
    for path in found:
        by_fold.setdefault(_fold(path), []).append(path)
    missing = [fold for fold in folds if fold not in by_fold]
    if missing:
        there = ", ".join(str(fold) for fold in sorted(by_fold) if fold >= 0) or "none"
        raise ConfigError(f"--folds {missing[0]}", why=f"no such fold in --model; there: {there}")
    return [path for fold in folds for path in by_fold[fold]]


def _fold(path: Path) -> int:
    """Return the fold of a run folder or checkpoint, -1 if it cannot be told."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file():
            data = run_config(folder).get("data")
            if isinstance(data, dict) and isinstance(data.get("fold"), int):
                return int(data["fold"])
    match = re.search(r"fold_?(\d+)", str(path))
    return int(match[1]) if match else -1


def _options() -> list[click.Parameter]:
    option = click.Option
    return [
        click.Argument(["paths"], nargs=-1, type=ANY_PATH, metavar="[IN OUT]"),
        option(
            ["-i", "--input"],
            type=ANY_PATH,
            metavar="PATH",
            help="An image, a folder of images or DICOM series, or a dataset.",
        ),
        option(["-o", "--output"], type=ANY_PATH, metavar="DIR", help="Where the segmentations go."),
        option(
            ["--model", "--checkpoint"],
            type=ANY_PATH,
            required=True,
            multiple=True,
            metavar="RUN|CKPT",
            shell_complete=complete_runs,
            help="Run folder, checkpoint, or folder of runs, one a fold. Repeat it to average several.",
        ),
        option(
            ["--folds"], type=ListType(number=True), metavar="0,1", help="Use only these folds of --model."
        ),
        option(
            ["--tta/--no-tta"],
            default=False,
            show_default=True,
            help="Average over several views: mirrored ones, or those of the method.",
        ),
        option(
            ["--overlap"],
            type=click.FloatRange(0, 1, max_open=True),
            default=0.5,
            show_default=True,
            metavar="F",
            help="Overlap of neighbouring windows.",
        ),
        *compute_options(),
        option(["--save-probabilities"], is_flag=True, help="Also write the probabilities (.npz)."),
        option(["--save-uncertainty"], is_flag=True, help="Also write an uncertainty map (NIfTI)."),
        option(["--preview"], is_flag=True, help="Also write one picture a case (PNG)."),
        option(["--statistics"], is_flag=True, help="Also write the volume of each label in ml."),
        option(["--continue", "continue_"], is_flag=True, help="Leave finished cases as they are."),
        option(
            ["--part"],
            type=PartType(),
            default="1/1",
            metavar="I/N",
            help="Do the I-th of N parts of the cases.",
        ),
        option(
            ["--parts"],
            type=POSITIVE,
            metavar="N",
            help="Do N parts in as many processes or jobs, and put their reports together.",
        ),
        *executor_options("parts"),
        option(
            ["--max-memory"],
            type=click.FloatRange(0),
            default=0.0,
            metavar="GIB",
            help="Memory of one process. What the largest case needs is said before the start; cases that "
            "need more are refused.",
        ),
        option(
            ["--report"], type=FILE, metavar="FILE", help="Where report.json goes.  [default: in the output]"
        ),
    ]


predict = Predict(
    "predict",
    kind="predict",
    params=_options(),
    help=(
        "Segment images with a trained model.\n\nIN and OUT may be given as -i and -o; METHOD may be left "
        "out then, because the checkpoint knows it. A case that fails is reported and the others are done; "
        "the exit code is 3 then. Results have the grid of their input."
    ),
    short_help="Segment images with a trained model.",
)
