"""tensorboard: what this plugin adds to medrl. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medrl.core import PluginInfo, hookimpl


@hookimpl
def medrl_plugin_info() -> PluginInfo:
    """Say who this is."""
    return PluginInfo(
        name="tensorboard", api=1, summary="watch every run in TensorBoard", license="Apache-2.0"
    )


@hookimpl
def medrl_run_started(run: Any) -> None:
    """Open the board of a run and show its config."""
    from medrl_tensorboard.board import board_of

    board_of(run).text("config", run.config_yaml, 0)


@hookimpl
def medrl_metrics_logged(run: Any, step: int, metrics: Mapping[str, object]) -> None:
    """Add the numbers of one record."""
    from medrl_tensorboard.board import board_of

    board_of(run).scalars(step, metrics)


@hookimpl
def medrl_checkpoint_saved(run: Any, path: Path, step: int) -> None:
    """Note a checkpoint."""
    from medrl_tensorboard.board import board_of

    board_of(run).text("checkpoint", path.name, step)


@hookimpl
def medrl_run_finished(run: Any, outcome: str) -> None:
    """Note the end and close the board."""
    from medrl_tensorboard.board import close

    close(run, outcome)
