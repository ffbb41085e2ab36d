"""``medrl train METHOD``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from medrl.cli.console import console, rank
from medrl.cli.launch import has_speaker, inside_launcher, launch, launcher_token
from medrl.cli.layers import FAST_DEV_RUN, config_with_origins, flag_layers, resolve_all
from medrl.cli.many import Planned, Variations, check_names, do_elsewhere, show_runs
from medrl.cli.method_command import Call, MethodCommand, existing
from medrl.cli.options import train_options
from medrl.cli.progress import training_progress
from medrl.cli.requeue import queued_again
from medrl.cli.runfiles import read_run
from medrl.core.errors import EXIT_OK, ConfigError, Interrupted, MedrlError, did_you_mean


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
        refuse_sweep(shared["config"])
        scratch = scratch_folder() if shared["fast_dev_run"] else None
        try:
            plan = plan_runs(call, scratch)
            if shared["print_config"] or shared["dry_run"]:
                show_plan(call, plan)
                return EXIT_OK
            with queued_again(shared["requeue"]) as ended:
                ended(code := train_all(call, plan))
            return code
        finally:
            if scratch is not None and rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)


def refuse_sweep(file: Path | None) -> None:
    """Refuse a config file that says what varies.

    Raises:
        ConfigError: It has a block `sweep`.
    """
    if file is None:
        return
    from medrl.core.config import load_yaml

    if "sweep" in load_yaml(Path(file)):
        raise ConfigError(f"{file}: sweep", why="one run has no such block", do=f"medrl sweep {file}")


def show_plan(call: Call, plan: list[Planned]) -> None:
    """Print the configs of a plan, or say what would be done."""
    if call.shared["print_config"]:
        for planned in plan:
            click.echo(config_with_origins(planned.resolved), nl=False)
        return
    from medrl.cli.dry_run import describe

    for index, planned in enumerate(plan, start=1):
        if len(plan) > 1:
            console().heading(f"run {index} of {len(plan)}")
        describe(call.manager, call.method, planned, call.shared)
    console().say("nothing was written")


def plan_runs(call: Call, scratch: Path | None, varied: Variations | None = None) -> list[Planned]:
    """Return the runs that the flags ask for, each with its validated config and folder.

    Args:
        call: The call.
        scratch: Folder of a trial run.
        varied: What varies beyond ``--fold all`` and ``--seeds``.

    Raises:
        ConfigError: With every problem of the configs.
    """
    shared = call.shared
    varied = varied or Variations()
    some = {key: values[0] for key, values in varied.grid.items()}
    first = resolve_call(call, varied=some)
    check_keys(call.manager, first)
    only_told = shared["print_config"] or shared["dry_run"]
    if scratch is not None and first.config.data.root is None and not only_told:
        shared["synthetic"] = write_synthetic(call, first.config, scratch / "data")
        first = resolve_call(call, varied=some)
    if shared["fold"] == "all":
        varied = replace(varied, folds=tuple(range(first.config.data.folds)))
    if shared["seeds"]:
        start = first.config.train.seed
        varied = replace(varied, seeds=tuple(range(start, start + shared["seeds"])))
    if len(varied) > 1 and inside_launcher():
        raise ConfigError(
            "--fold all and --seeds",
            why="inside torchrun or srun one call is one run",
            do="use --devices N instead",
        )
    elsewhere = bool(shared["executor"] or shared["jobs"]) and shared["by"] == "run" and len(varied) > 1
    root = folder_of_all(call, first, scratch) if varied.grid or elsewhere else None
    plan, problems = [], dict[str, None]()
    for name, values, fold, seed in varied.runs():
        try:
            resolved = resolve_call(call, fold=fold, seed=seed, varied=values)
            check_keys(call.manager, resolved)
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems or [str(error)]))
            continue
        config = resolved.config
        flags: tuple[str, ...] = ()
        if len(varied) > 1:
            flags = ("--fold", str(config.data.fold), "--seed", str(config.train.seed), "--seeds", "1")
        where = root / name if root is not None else run_folder(call, resolved, name, scratch)
        plan.append(Planned(resolved, where, flags, name, values))
    if problems:
        raise ConfigError(
            "the configuration is not valid",
            why=f"{len(problems)} problem" + ("s" if len(problems) > 1 else ""),
            do=f"medrl train {call.method} --print-config shows every key",
            problems=list(problems),
        )
    check_names(plan)
    return plan


def folder_of_all(call: Call, resolved: Any, scratch: Path | None) -> Path:
    """Return the folder of the runs of a grid; one that medrl chooses is always a new one."""
    if call.shared["output"] is not None:
        return Path(call.shared["output"])
    if scratch is not None:
        return scratch / "runs"
    from medrl.core.runlog import new_run_name

    return unused(Path("runs") / f"{new_run_name(call.method, None, resolved.hash)}_sweep")


def resolve_call(
    call: Call,
    *,
    fold: int | None = None,
    seed: int | None = None,
    varied: Mapping[str, Any] | None = None,
) -> Any:
    """Resolve the config of one run of this call; `varied` wins over everything else."""
    from medrl.core.config import Layer, nest

    shared = call.shared
    layers, file = [], shared["config"]
    if "config_values" in shared:  # the file holds more than a config
        layers.append(Layer(file.name, shared["config_values"], base_dir=file.resolve().parent))
    if shared["fast_dev_run"]:
        layers.append(Layer("--fast-dev-run", nest({**FAST_DEV_RUN, **shared.get("synthetic", {})})))
    layers += flag_layers(train.params, shared)
    layers += flag_layers(call.command.params, call.own)
    chosen_fold = fold if fold is not None else shared["fold"]
    if isinstance(chosen_fold, int):
        layers.append(Layer("--fold", nest({"data.fold": chosen_fold})))
    assignments = list(shared["assignments"])
    if shared["seed"] is not None:
        layers.append(Layer("--seed", nest({"train.seed": shared["seed"]})))
    if seed is not None:
        assignments.append(f"train.seed={seed}")
    assignments += [f"{key}={json.dumps(value)}" for key, value in (varied or {}).items()]
    return resolve_all(
        call.manager,
        call.method,
        preset=shared["preset"],
        config_file=None if "config_values" in shared else file,
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
    elsewhere = bool(call.shared["executor"] or call.shared["jobs"]) and not inside_launcher()
    if elsewhere and call.shared["by"] == "run":
        return do_elsewhere(call, plan)
    if call.shared["by"] == "stage":
        call.shared["stage_executor"] = executor_of_stages(call, plan[0].resolved.config)
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
        show_runs(plan, {planned.label: code for planned, code in codes})
    return next((code for _, code in codes if code), EXIT_OK)


def train_one(call: Call, planned: Planned) -> int:
    """Do one run, in this process or in several ranks."""
    shared = call.shared
    screen = console()
    devices = shared["devices"] or 1
    if devices > 1 and not inside_launcher() and shared.get("stage_executor") is None:
        arguments = [*screen.arguments, *planned.flags, "-o", str(planned.run_dir)]
        for key, value in shared.get("synthetic", {}).items():
            if planned.resolved.origins.get(key) == "--fast-dev-run":
                arguments += ["--set", f"{key}={json.dumps(value)}"]
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
            stage_executor=shared.get("stage_executor"),
            devices=devices,
            extra={**call.extra, "progress": show},
        )
        try:
            call.start(job)
        except Interrupted as error:
            error.do = f"medrl resume {planned.run_dir}"
            raise
    return EXIT_OK


def executor_of_stages(call: Call, config: Any) -> Any:
    """Return what does each stage of a run as a task.

    Raises:
        ConfigError: The method has no stages, or this is one of several ranks.
    """
    if "stage" not in type(config).model_fields:
        raise ConfigError("--by stage", why=f"method '{call.method}' has no stages", do="leave it out")
    if inside_launcher():
        raise ConfigError(
            "--by stage",
            why="inside torchrun or srun every rank would start the tasks",
            do="start it without them; --devices N, or --resource tasks=N, gives each stage N ranks",
        )
    from medrl.core.executors import make_executor, parse_resources

    return make_executor(
        call.shared["executor"] or "local", resources=parse_resources(call.shared["resource"])
    )


def write_synthetic(call: Call, config: Any, folder: Path) -> dict[str, Any]:
    """Write a small synthetic dataset, because a trial run was asked for without data.

    Returns:
        Dotted config values that name the data. Where the method is tried as it comes, neither with --preset
        nor with --config, also the small sizes that the plugin sets in its own trials.
    """
    from medrl.core.config import DataConfig
    from medrl.core.testing.synthetic import write_trial

    console().say("no dataset is named: this trial run uses a synthetic one")
    info = call.manager.info(call.method)
    if info.trial:
        values = write_trial(info, folder)
        if call.shared["preset"] is None and call.shared["config"] is None:
            return values
        blocks = [name for name in type(config).model_fields if isinstance(getattr(config, name), DataConfig)]
        return {key: value for key, value in values.items() if key.partition(".")[0] in blocks}
    from medrl.core.phantoms.prostate import write_prostate

    write_prostate(folder, cases=6, test_cases=0, shape=(32, 32, 12))
    return {"data.root": str(folder)}


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
