"""mlflow: what this plugin adds to medrl. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medrl.core import PluginInfo, hookimpl


@hookimpl
def medrl_plugin_info() -> PluginInfo:
    """Say who this is."""
    return PluginInfo(name="mlflow", api=1, summary="record every run in MLflow", license="Apache-2.0")


@hookimpl
def medrl_run_started(run: Any) -> None:
    """Begin a run of MLflow, or go on with that of a resumed run."""
    from medrl_mlflow.tracking import begin

    begin(run)


@hookimpl
def medrl_metrics_logged(run: Any, step: int, metrics: Mapping[str, object]) -> None:
    """Log the numbers of one record."""
    from medrl_mlflow.tracking import tracked

    tracked(run).log(step, metrics)


@hookimpl
def medrl_checkpoint_saved(run: Any, path: Path, step: int) -> None:
    """Tag the run with its newest checkpoint."""
    from medrl_mlflow.tracking import tracked

    tracked(run).tag("checkpoint", f"{path.name} at step {step}")


@hookimpl
def medrl_run_finished(run: Any, outcome: str) -> None:
    """End the run of MLflow."""
    from medrl_mlflow.tracking import end

    end(run, outcome)
