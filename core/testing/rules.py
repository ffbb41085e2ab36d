"""The rules by name, in the order in which they are checked, and the plugin that they are checked on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from medrl.core.manager import LoadedPlugin, PluginManager
from medrl.core.testing.findings import Finding, NotChecked, Outcome, failed
from medrl.core.testing.static import check_commands, check_config, check_import_weight, check_parts

if TYPE_CHECKING:
    from medrl.core.testing.trial import Trial


class Subject:
    """A loaded plugin, and a folder for what the checks write.

    Args:
        plugin: The plugin.
        manager: That loaded it.
        values: Nested config values for training runs.
        folder: Where runs are written and kept; by default a temporary folder.
    """

    def __init__(
        self,
        plugin: LoadedPlugin,
        manager: PluginManager,
        *,
        values: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.plugin, self.manager = plugin, manager
        self.values = dict(values or {})
        self._given, self._made = folder, ""

    @cached_property
    def folder(self) -> Path:
        """Where runs are written."""
        if self._given is not None:
            self._given.mkdir(parents=True, exist_ok=True)
            return self._given
        self._made = tempfile.mkdtemp(prefix="medrl-check-")
        return Path(self._made)

    @cached_property
    def trial(self) -> Trial:
        """Training runs of the plugin, each made when it is first asked for."""
        from medrl.core.testing.trial import Trial

        return Trial(self.plugin, self.manager, self.folder, self.values)

    def close(self) -> None:
        """Remove the temporary folder."""
        if self._made:
            shutil.rmtree(self._made, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


Rule = Callable[[Subject], list[Finding]]


def _static(check: Callable[[LoadedPlugin, PluginManager], list[Finding]]) -> Rule:
    return lambda subject: check(subject.plugin, subject.manager)


def _training(name: str) -> Rule:
    def check(subject: Subject) -> list[Finding]:
        from medrl.core.testing import training

        found: list[Finding] = getattr(training, name)(subject)
        return found

    return check


TRAINING_RULES: dict[str, Rule] = {
    "environments": _training("check_environments"),
    "learning": _training("check_learning"),
    "checkpoint": _training("check_checkpoint"),
    "resume": _training("check_resume"),
    "ranks": _training("check_ranks"),
    "geometry": _training("check_geometry"),
}
"""Rules that load torch, and most of which train."""

RULES: dict[str, Rule] = {
    "import weight": _static(check_import_weight),
    "parts": _static(check_parts),
    "commands": _static(check_commands),
    "config": _static(check_config),
    **TRAINING_RULES,
}
"""All rules. That a plugin loads and its hooks are well formed is checked by loading it."""


def examine_rule(rule: str, subject: Subject) -> Outcome:
    """Check one rule; a check that a plugin makes raise is a finding too."""
    try:
        return Outcome(RULES[rule](subject))
    except NotChecked as reason:
        return Outcome([], skipped=str(reason))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the code of a plugin may raise anything
        return Outcome([failed(rule, "it could not be checked", error)])


def check_rule(rule: str, subject: Subject) -> list[Finding]:
    """Check one rule and return what breaks it; nothing where it does not apply to the plugin."""
    return examine_rule(rule, subject).findings
