"""What the command line hands to a method: a job, and options bound to config keys.

Light: nothing heavy is imported here, because every plugin's `commands.py` imports this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from medrl.core.checkpoint import Checkpoint
    from medrl.core.config import Layer, MethodConfig, Resolved
    from medrl.core.executors import Executor
    from medrl.core.manager import PluginManager
    from medrl.core.predicting import PredictOutcome
    from medrl.core.runtime import Runtime
    from medrl.core.types import Predictor

EXECUTORS = ("local", "slurm")


class ConfigOption(click.Option):
    """A click option whose value overrides one config key.

    The command line layers such options over the config file; left out, an option changes nothing.
    """

    def __init__(self, *args: Any, config_key: str, **kwargs: Any) -> None:
        kwargs.setdefault("default", None)
        super().__init__(*args, **kwargs)
        self.config_key = config_key


def config_option(*names: str, key: str, **kwargs: Any) -> Callable[[Any], Any]:
    """Declare a click option for the config key `key`, such as ``weighting.mode``.

    Example::

        @click.command("train")
        @config_option("--weighting", key="weighting.mode", type=click.Choice(["uniform", "quality"]))
        def train(job: TrainJob) -> None: ...
    """
    return click.option(*names, cls=ConfigOption, config_key=key, **kwargs)


def executor_options(what: str) -> list[click.Parameter]:
    """Return who does the `what` of a command, and with which resources."""
    option = click.Option
    return [
        option(
            ["--executor"],
            type=click.Choice(EXECUTORS),
            help=f"Who does the {what}: processes of this machine, or jobs of Slurm.",
        ),
        option(
            ["--jobs"],
            type=click.IntRange(min=1),
            metavar="N",
            help=f"At most N of the {what} at a time.",
        ),
        option(
            ["--resource"],
            multiple=True,
            metavar="KEY=VALUE",
            help="What a Slurm job gets: minutes, gpus, cpus, memory_gb, nodes, tasks (ranks a node), "
            "partition, account, requeues, or any option of sbatch. Repeatable.",
        ),
    ]


def global_arguments() -> list[str]:
    """Return the global options of the command at work that decide what a command does, as words."""
    context = click.get_current_context(silent=True)
    top = context.find_root().params if context is not None else {}
    words = ["--plain"]
    if top.get("plugins_file"):
        words += ["--plugins-file", str(Path(top["plugins_file"]).resolve())]
    words += ["--no-third-party"] * bool(top.get("no_third_party"))
    return words + ["--debug"] * bool(top.get("debug"))


def resolve_tool(
    manager: PluginManager,
    method: str,
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    last: Mapping[str, Any] | Sequence[Layer] | None = None,
) -> Resolved[Any]:
    """Resolve the config of a tool, such as ``medrl kspace train-reward``.

    Args:
        manager: Of plugins.
        method: Whose config it is.
        values: ``{dotted key: value}`` of the options that were given.
        given: The tool's ``preset``, ``config_file`` and ``assignments`` (of ``--set``).
        last: What the tool itself decides, above all of these: values, or layers in their order.

    Raises:
        ConfigError: With every problem of the config.
    """
    from medrl.core.config import Layer, nest, parse_set, resolve_method

    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    layers = [Layer("command line", nest(plain), base_dir=Path.cwd())]
    assignments: Sequence[str] = given["assignments"]
    layers += [Layer("--set", nest(dict([parse_set(text)])), base_dir=Path.cwd()) for text in assignments]
    layers += [Layer("this tool", dict(last))] if isinstance(last, Mapping) else last or []
    return resolve_method(
        manager, method, preset=given["preset"], config_file=given["config_file"], layers=layers
    )


def config_overrides(command: click.Command, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{dotted key: value}`` of the given config options, leaving out those not given."""
    found: dict[str, Any] = {}
    for parameter in command.params:
        if not isinstance(parameter, ConfigOption) or parameter.name is None:
            continue
        value = values.get(parameter.name)
        if value is None or value == ():
            continue
        found[parameter.config_key] = list(value) if isinstance(value, tuple) else value
    return found


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything a training run needs; the callback of a method's train command receives it.

    Attributes:
        resolved: The validated config with the origin of each value.
        run_dir: The run folder; created by `runtime()`.
        resume: ``auto`` continues a run folder that exists, ``never`` refuses one, ``must`` demands one.
        init_from: A checkpoint whose weights start the run.
        command: The command line, for the record.
        manager: The plugin manager, the source of models, losses and observers by key.
        fast_dev_run: Two steps, one validation, nothing kept but the evidence that it works.
        stage_executor: Does each stage of a method that has stages as a task of its own; None does them in
            this program.
        devices: Ranks that each of these tasks starts on its machine.
        extra: Values of the method's own options that are no config keys.
    """

    method: str
    resolved: Resolved[Any]
    run_dir: Path
    manager: PluginManager
    resume: str = "auto"
    init_from: Path | None = None
    trust_checkpoint: bool = False
    command: Sequence[str] = ()
    fast_dev_run: bool = False
    stage_executor: Executor | None = None
    devices: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The validated, frozen config model of the method."""
        return self.resolved.config

    def runtime(self) -> AbstractContextManager[Runtime]:
        """Open the runtime of this job: ranks, device, precision, seed, run folder, lock."""
        from medrl.core.runtime import Runtime

        return Runtime.start(self)


@dataclass(frozen=True, kw_only=True)
class PredictJob:
    """A prediction run over many cases; the callback of a method's predict command receives it.

    Attributes:
        checkpoints: One file for each fold; probabilities are averaged.
        part: ``(I, N)``: this process predicts every N-th case, starting with the I-th (1-based).
        max_memory_gb: Memory in GiB that this process may take; 0 for no limit.
        say: Shows one line to the person before the work begins.
    """

    method: str
    inputs: Path
    output: Path
    checkpoints: Sequence[Path]
    manager: PluginManager
    tta: bool = False
    overlap: float = 0.5
    device: str = "auto"
    threads: int = 0
    precision: str = "fp32"
    save_probabilities: bool = False
    save_uncertainty: bool = False
    preview: bool = False
    statistics: bool = False
    continue_: bool = False
    part: tuple[int, int] = (1, 1)
    max_memory_gb: float = 0.0
    say: Callable[[str], None] = lambda _line: None
    report: Path | None = None
    command: Sequence[str] = ()
    progress: Callable[[int, int, str], None] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def run(self, load: Callable[[Checkpoint], Predictor]) -> PredictOutcome:
        """Predict every case with the predictors that `load` makes of the checkpoints."""
        from medrl.core import predicting

        return predicting.run(self, load)


@dataclass(frozen=True, kw_only=True)
class DemoJob:
    """A demonstration from synthetic data to report; the callback of a method's demo command receives it.

    Attributes:
        folder: Where everything is written.
        preset: ``smoke`` (a minute or two) or ``small`` (minutes).
        say: Shows one line of progress to the person.
        train: Trains a config given as nested values and returns the run folder:
            ``train(method, values, run_dir)``.
    """

    method: str
    folder: Path
    manager: PluginManager
    preset: str = "small"
    seed: int = 1
    threads: int = 1
    say: Callable[[str], None] = lambda _line: None
    command: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The outcome of a demo: a table with the baseline, the method and a trivial control, and a report.

    Attributes:
        columns: Names of the numbers in each row.
        rows: ``(name, role, numbers)``; role is ``baseline``, ``method`` or ``control``.
        report: Path of the self-contained ``report.html``.
        notes: Sentences that say what the numbers mean.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[float]]]
    report: Path
    notes: Sequence[str] = ()


def build_train_job(
    manager: PluginManager,
    method: str,
    values: Mapping[str, Any],
    run_dir: Path,
    *,
    preset: str | None = None,
    resume: str = "auto",
    command: Sequence[str] = (),
) -> TrainJob:
    """Make a training job from nested values over the method's defaults and a preset.

    For programs, demos and tests; the command line builds the same job from its flags.
    """
    from medrl.core.config import Layer, resolve_method

    layers = [Layer(origin="program", values=dict(values))]
    resolved: Resolved[MethodConfig] = resolve_method(manager, method, preset=preset, layers=layers)
    return TrainJob(
        method=method, resolved=resolved, run_dir=run_dir, manager=manager, resume=resume, command=command
    )
