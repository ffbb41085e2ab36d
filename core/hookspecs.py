"""Every hook that a plugin may implement, each with an example that the tests run.

A plugin is a module named by an entry point of the group ``medrl.plugins``. It implements the hooks that it
needs with `hookimpl` and leaves out the others. An implementation may leave out arguments that it does not
use.

Registration hooks are called once, when the plugin is loaded. Observers are called while a run goes on; what
they return is ignored, and an observer that raises is switched off with one warning: no hook alters a run.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from medrl.core.manager import CommandRecorder
    from medrl.core.registry import Recorder
    from medrl.core.types import PluginInfo

PROJECT = "medrl"
ENTRY_POINT_GROUP = "medrl.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function as the implementation of the hook of its name."""

OBSERVERS = (
    "medrl_run_started",
    "medrl_metrics_logged",
    "medrl_checkpoint_saved",
    "medrl_case_predicted",
    "medrl_run_finished",
)
"""Names of the hooks that watch a run."""


@hookspec(firstresult=True)
def medrl_plugin_info() -> PluginInfo:  # type: ignore[empty-body]  # a specification has no body
    """Say who the plugin is; the only hook that every plugin must implement.

    `name` must equal the name of the entry point, and `api` the plugin API that the plugin was written for
    (now 1). A method also names `config`, its config model. `trial` names a function that writes tiny data
    and returns the config values of a trial on them, for ``medrl plugins check`` and ``--fast-dev-run``;
    without it both take synthetic prostates. `networks` is for ``medrl model export``. All of it is in
    `medrl.core.types.PluginInfo`.

    Example::

        @hookimpl
        def medrl_plugin_info():
            return PluginInfo(name="cine", api=1, summary="choose the k-space columns of a cine scan",
                              license="Apache-2.0")
    """


@hookspec
def medrl_register_models(registry: Recorder[Any]) -> None:
    """Register networks: `torch.nn.Module` classes, or functions that return one.

    Example::

        @hookimpl
        def medrl_register_models(registry):
            registry.add("line", "medrl_cine.models:LineNet", summary="one linear layer over the columns")
    """


@hookspec
def medrl_register_losses(registry: Recorder[Any]) -> None:
    """Register losses: functions of tensors, or classes whose objects are called with tensors.

    Example::

        @hookimpl
        def medrl_register_losses(registry):
            registry.add("energy", "medrl_cine.losses:missed_energy", summary="energy of the columns left")
    """


@hookspec
def medrl_register_agents(registry: Recorder[Any]) -> None:
    """Register policies, each with its value function if it has one.

    Example::

        @hookimpl
        def medrl_register_agents(registry):
            registry.add("column", "medrl_cine.agent:ColumnPolicy", summary="one logit for each column")
    """


@hookspec
def medrl_register_environments(registry: Recorder[Any]) -> None:
    """Register batched environments (`medrl.core.rl.env.BatchedEnv`).

    Example::

        @hookimpl
        def medrl_register_environments(registry):
            registry.add("columns", "medrl_cine.env:ColumnEnv", summary="acquire one column a step")
    """


@hookspec
def medrl_register_rewards(registry: Recorder[Any]) -> None:
    """Register rewards: functions of states or segmentations that return one number for each environment.

    Example::

        @hookimpl
        def medrl_register_rewards(registry):
            registry.add("gain", "medrl_cine.losses:energy_gain", summary="share of energy that a step adds")
    """


@hookspec
def medrl_register_metrics(registry: Recorder[Any]) -> None:
    """Register metrics: functions of a prediction and a reference.

    Example::

        @hookimpl
        def medrl_register_metrics(registry):
            registry.add("captured", "medrl_cine.losses:captured_energy", summary="share of energy captured")
    """


@hookspec
def medrl_register_datasets(registry: Recorder[Any]) -> None:
    """Register dataset readers: functions of a folder that return a `medrl.core.dataset.Dataset`.

    Example::

        @hookimpl
        def medrl_register_datasets(registry):
            registry.add("profiles", "medrl_cine.env:read_profiles", summary="a folder of column profiles")
    """


@hookspec
def medrl_register_commands(commands: CommandRecorder) -> None:
    """Name the click commands of a method, as ``"module:attribute"``; none is imported before it is used.

    `train`, `predict`, `evaluate` and `demo` take part in the commands of the same name; a `tool` appears as
    ``medrl <method> <tool>``.

    Example::

        @hookimpl
        def medrl_register_commands(commands):
            commands.train("medrl_cine.commands:train")
            commands.tool("medrl_cine.commands:show_profile")
    """


@hookspec
def medrl_run_started(run: Any) -> None:
    """Observe that a run begins. `run` is the `medrl.core.runlog.RunFolder`.

    Example::

        @hookimpl
        def medrl_run_started(run):
            (run.dir / "started.txt").write_text("yes")
    """


@hookspec
def medrl_metrics_logged(run: Any, step: int, metrics: Mapping[str, float]) -> None:
    r"""Observe one record of metrics: plain numbers, already averaged over ranks.

    Example::

        @hookimpl
        def medrl_metrics_logged(run, step, metrics):
            with (run.dir / "loss.csv").open("a") as file:
                file.write(f"{step},{metrics['loss']}\n")
    """


@hookspec
def medrl_checkpoint_saved(run: Any, path: Path, step: int) -> None:
    """Observe a checkpoint that is complete on disk.

    Example::

        @hookimpl
        def medrl_checkpoint_saved(run, path, step):
            (run.dir / "newest.txt").write_text(f"{path.name} at step {step}")
    """


@hookspec
def medrl_case_predicted(run: Any, case: str, path: Path) -> None:
    """Observe the written segmentation of one case; `run` may be None, as prediction needs no run folder.

    Example::

        @hookimpl
        def medrl_case_predicted(case, path):
            path.with_name("done.txt").write_text(case)
    """


@hookspec
def medrl_run_finished(run: Any, outcome: str) -> None:
    """Observe the end of a run: ``finished``, ``interrupted`` or ``failed``.

    Example::

        @hookimpl
        def medrl_run_finished(run, outcome):
            (run.dir / "outcome.txt").write_text(outcome)
    """


def reference() -> str:
    """Return the reference of all hooks as Markdown, made from their specifications."""
    lines = ["# Hooks", "", "Made by `make docs` from `core/hookspecs.py`; the tests run every example.", ""]
    lines += [*(__doc__ or "").strip().splitlines()[2:], ""]
    for name, function in globals().items():
        if not name.startswith("medrl_"):
            continue
        text, _, example = (inspect.getdoc(function) or "").partition("Example::")
        lines += [f"## `{name}({', '.join(inspect.signature(function).parameters)})`", "", text.strip(), ""]
        lines += ["```python", textwrap.dedent(example).strip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"
