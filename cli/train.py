"""``medrl train METHOD``."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from medrl.cli.console import console, number, rank
from medrl.cli.launch import has_speaker, inside_launcher, launch, launcher_token
from medrl.cli.layers import FAST_DEV_RUN, config_with_origins, flag_layers, resolve_all
from medrl.cli.method_command import Call, MethodCommand, existing
from medrl.cli.options import train_options
from medrl.cli.progress import training_progress
from medrl.cli.runfiles import RunFacts, read_run
from medrl.core.errors import EXIT_OK, ConfigError, Interrupted, MedrlError, did_you_mean


@dataclass(frozen=True)
class Planned:
    """One run that is to be done.

    Attributes:
        flags: Arguments that set this run apart, for the ranks that a launcher starts.
    """

    resolved: Any
    run_dir: Path
    flags: tuple[str, ...] = ()


class Train(MethodCommand):
    """Trains a method: one run, or one for each fold and seed."""

    def find_method(self, ctx: click.Context, values: dict[str, Any]) -> str:
        """Take the method from the config file."""
        file = values.get("config")
        if file is None:
            return super().find_method(ctx, values)
        from medrl.core.config import load_yaml

        method = load_yaml(Path(file)).get("method")
        if not isinstance(method, str):
            raise ConfigError("METHOD is missing", why=f"and {file} has no key 'method'", do="medrl methods")
        return method

    def work(self, call: Call) -> int:
        """Resolve the config, plan the runs and do them."""
        shared = call.shared
        existing(shared["init_from"], option="--init-from")
        scratch = scratch_folder() if shared["fast_dev_run"] else None
        try:
            plan = plan_runs(call, scratch)
            if shared["print_config"]:
                for planned in plan:
                    click.echo(config_with_origins(planned.resolved), nl=False)
                return EXIT_OK
            if shared["dry_run"]:
                from medrl.cli.dry_run import describe

                for index, planned in enumerate(plan, start=1):
                    if len(plan) > 1:
                        console().heading(f"run {index} of {len(plan)}")
                    describe(call.manager, call.method, planned, shared)
                console().say("nothing was written")
                return EXIT_OK
            return train_all(call, plan)
        finally:
            if scratch is not None and rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)


def plan_runs(call: Call, scratch: Path | None) -> list[Planned]:
    """Return the runs that the flags ask for, each with its validated config and folder.

    Raises:
        ConfigError: With every problem of the config.
    """
    shared = call.shared
    first = resolve_call(call)
    folds = list(range(first.config.data.folds)) if shared["fold"] == "all" else [first.config.data.fold]
    start = first.config.train.seed
    seeds = list(range(start, start + (shared["seeds"] or 1)))
    check_keys(call.manager, first)
    if scratch is not None and first.config.data.root is None:
        shared["synthetic"] = str(scratch / "data")
    many = len(folds) * len(seeds) > 1
    if many and inside_launcher():
        raise ConfigError(
            "--fold all and --seeds",
            why="inside torchrun or srun one call is one run",
            do="use --devices N instead",
        )
    plan = []
    for fold in folds:
        for seed in seeds:
            resolved = resolve_call(call, fold=fold if shared["fold"] == "all" else None, seed=seed)
            name = "_".join([f"fold{fold}"] * (len(folds) > 1) + [f"seed{seed}"] * (len(seeds) > 1))
            flags = ("--fold", str(fold), "--seed", str(seed), "--seeds", "1") if many else ()
            plan.append(Planned(resolved, run_folder(call, resolved, name, scratch), flags))
    return plan


def resolve_call(call: Call, *, fold: int | None = None, seed: int | None = None) -> Any:
    """Resolve the config of one run of this call."""
    from medrl.core.config import Layer, nest

    shared = call.shared
    layers = []
    if shared["fast_dev_run"]:
        layers.append(Layer("--fast-dev-run", nest(FAST_DEV_RUN)))
    layers += flag_layers(train.params, shared)
    layers += flag_layers(call.command.params, call.own)
    if shared.get("synthetic"):
        layers.append(Layer("--fast-dev-run", nest({"data.root": shared["synthetic"]})))
    chosen_fold = fold if fold is not None else shared["fold"]
    if isinstance(chosen_fold, int):
        layers.append(Layer("--fold", nest({"data.fold": chosen_fold})))
    assignments = list(shared["assignments"])
    if shared["seed"] is not None:
        layers.append(Layer("--seed", nest({"train.seed": shared["seed"]})))
    if seed is not None and shared["seeds"]:
        assignments.append(f"train.seed={seed}")
    return resolve_all(
        call.manager,
        call.method,
        preset=shared["preset"],
        config_file=shared["config"],
        layers=layers,
        assignments=assignments,
    )


def scratch_folder() -> Path:
    """Return a new folder for a trial run; the ranks of one launcher share it."""
    if not inside_launcher():
        return Path(tempfile.mkdtemp(prefix="medrl-fast-"))
    folder = Path(tempfile.gettempdir()) / f"medrl-fast-{os.getuid()}-{launcher_token() or 'ranks'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder}", why="it belongs to somebody else", do="name a run folder with -o RUN")
    return folder


def run_folder(call: Call, resolved: Any, name: str, scratch: Path | None) -> Path:
    """Return where a run goes; a folder that medrl chooses is always a new one.

    Raises:
        ConfigError: ``--resume must`` without a folder.
    """
    output: Path | None = call.shared["output"]
    if output is not None:
        return output / name if name else output
    if call.shared["resume"] == "must":
        raise ConfigError("--resume must", why="which run is meant?", do="name its folder with -o RUN")
    if scratch is not None:
        return scratch / (name or "run")
    from medrl.core.runlog import new_run_name

    base = Path("runs") / new_run_name(call.method, resolved.config.data.fold, resolved.hash)
    if inside_launcher():
        # Every rank must come to the same name without asking the others.
        return base.with_name(f"{base.name}-{launcher_token()}") if launcher_token() else base
    return unused(base)


def unused(path: Path) -> Path:
    """Return the path, with a number behind it where it is taken."""
    number = 2
    found = path
    while found.exists():
        found = path.with_name(f"{path.name}-{number}")
        number += 1
    return found


def check_keys(manager: Any, resolved: Any) -> None:
    """Refuse registry keys that nobody registers; nothing heavy is imported for this.

    Raises:
        ConfigError: With every unknown key and its near matches.
    """
    from medrl.core.config import ModelConfig
    from medrl.core.registry import KINDS

    problems = []
    for name in type(resolved.config).model_fields:
        block = getattr(resolved.config, name)
        if not isinstance(block, ModelConfig):
            continue
        kinds = [kind for kind in KINDS if kind.startswith(name.rstrip("s"))] or list(KINDS)
        keys = sorted({key for kind in kinds for key in manager.registry(kind).keys()})  # noqa: SIM118 - no mapping
        if block.name not in keys:
            problems.append(f"{name}.name: no '{block.name}', {did_you_mean(block.name, keys)}")
    if problems:
        raise ConfigError("the configuration is not valid", why="unknown keys", problems=problems)


def train_all(call: Call, plan: list[Planned]) -> int:
    """Do the runs one after the other; a failed one does not stop the others, a signal does."""
    if call.shared.get("synthetic"):
        write_synthetic(Path(call.shared["synthetic"]))
    if len(plan) == 1:
        code = train_one(call, plan[0])
        if code == EXIT_OK:
            say_result(call, plan[0])
        return code
    from medrl.cli.failure import show_error

    codes: list[tuple[Planned, int]] = []
    try:
        for index, planned in enumerate(plan, start=1):
            console().heading(f"run {index} of {len(plan)}: {planned.run_dir}")
            try:
                code = train_one(call, planned)
            except Interrupted:
                codes.append((planned, 130))
                raise
            except MedrlError as error:
                show_error(error, console())
                code = error.exit_code
            codes.append((planned, code))
            if code in (130, 143):
                return code
    finally:
        summary(codes)
    return next((code for _, code in codes if code), EXIT_OK)


def train_one(call: Call, planned: Planned) -> int:
    """Do one run, in this process or in several ranks."""
    shared = call.shared
    screen = console()
    devices = shared["devices"] or 1
    if devices > 1 and not inside_launcher():
        arguments = [*screen.arguments, *planned.flags, "-o", str(planned.run_dir)]
        if shared.get("synthetic"):
            arguments += ["--data", shared["synthetic"]]
        return launch(arguments, devices, screen)
    from medrl.core.jobs import TrainJob

    if not has_speaker():
        screen.loading()
    screen.detail(f"run folder {planned.run_dir}")
    with training_progress() as show:
        job = TrainJob(
            method=call.method,
            resolved=planned.resolved,
            run_dir=planned.run_dir,
            manager=call.manager,
            resume=shared["resume"],
            init_from=shared["init_from"],
            trust_checkpoint=shared["trust_checkpoint"],
            command=call.shared.get("command") or ("medrl", *screen.arguments),
            fast_dev_run=shared["fast_dev_run"],
            extra={**call.extra, "progress": show},
        )
        try:
            call.start(job)
        except Interrupted as error:
            error.do = f"medrl resume {planned.run_dir}"
            raise
    return EXIT_OK


def write_synthetic(root: Path) -> None:
    """Write a small synthetic dataset, because a trial run was asked for without data."""
    from medrl.core.phantoms.prostate import write_prostate

    console().say("no dataset is named: this trial run uses a synthetic one")
    write_prostate(root, cases=6, test_cases=0, shape=(32, 32, 12))


def say_result(call: Call, planned: Planned) -> None:
    """Say where the run is and what can be done with it."""
    if rank() or has_speaker():
        return
    facts = read_run(planned.run_dir)
    screen = console()
    if call.shared["fast_dev_run"] and call.shared["output"] is None:
        screen.say(f"fast dev run: {facts.sentence()}; its files are removed again")
        return
    screen.say(f"{planned.run_dir}: {facts.sentence()}")
    report = fresh_report(planned.run_dir)
    if report is not None:
        screen.say(f"report: {report}")
    screen.say(f"next: medrl predict {call.method} -i IMAGES -o OUT --model {planned.run_dir}")


def fresh_report(run_dir: Path) -> Path | None:
    """Return the report of a run, made now unless the method made one after its last record."""
    from medrl.core.report import REPORT_NAME, build_report

    path, metrics = run_dir / REPORT_NAME, run_dir / "metrics.jsonl"
    if path.is_file() and metrics.is_file() and path.stat().st_mtime >= metrics.stat().st_mtime:
        return path
    try:
        return build_report(run_dir)
    except MedrlError as error:
        console().line(f"warning: the report could not be written: {error}")
        return None


def summary(codes: list[tuple[Planned, int]]) -> None:
    """Write the table of several runs."""
    rows = []
    best: list[float] = []
    for planned, code in codes:
        facts = read_run(planned.run_dir) if (planned.run_dir / "manifest.json").is_file() else RunFacts()
        config = planned.resolved.config
        rows.append(
            [
                str(config.data.fold),
                str(config.train.seed),
                facts.status or f"failed ({code})",
                str(facts.step),
                facts.best_text(),
                str(planned.run_dir),
            ]
        )
        best += [facts.best[1]] if facts.best is not None else []
    console().table(["fold", "seed", "status", "step", "best", "run"], rows, right=(0, 1, 3))
    if len(best) > 1:
        from statistics import fmean, stdev

        text = (
            f"best: mean {number(fmean(best))}, standard deviation {number(stdev(best))} of {len(best)} runs"
        )
        console().say(text)


train = Train(
    "train",
    kind="train",
    params=train_options(),
    help=(
        "Train a method.\n\nThe config is layered: the method's defaults, then --preset, the file of "
        "--config, the named options, and --set. --print-config shows where each value comes from. METHOD "
        "may be left out where the config file names it."
    ),
    short_help="Train a method.",
)
