"""The plugin for pytest: one test for each rule of medrl on each plugin that pyproject.toml names.

Installed with medrl. In the project of a plugin::

    [tool.pytest.ini_options]
    medrl_plugins = ["cine"]

Then ``pytest`` also runs ``medrl::cine::loads``, ``medrl::cine::config`` and the others; ``pytest -k medrl``
runs these alone, ``--medrl-quick`` leaves out those that train, and ``--medrl-plugin NAME`` adds a plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from medrl.core.testing.rules import Subject

LOADS = "loads"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ini value and the options."""
    parser.addini("medrl_plugins", "plugins of medrl to check, by name", type="args", default=[])
    group = parser.getgroup("medrl")
    group.addoption(
        "--medrl-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="Check this plugin of medrl; may be repeated.",
    )
    group.addoption("--medrl-quick", action="store_true", help="Leave out the rules of medrl that train.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add one test for each rule."""
    names = [*config.getini("medrl_plugins"), *config.getoption("--medrl-plugin")]
    if not names or hasattr(config, "workerinput"):
        return
    from medrl.core.testing.rules import RULES, TRAINING_RULES

    quick = config.getoption("--medrl-quick")
    rules = [LOADS, *(rule for rule in RULES if not (quick and rule in TRAINING_RULES))]
    for name in dict.fromkeys(names):
        checked = _Checked(name)
        for rule in rules:
            items.append(
                RuleItem.from_parent(session, name=f"medrl::{name}::{rule}", checked=checked, rule=rule)
            )
        config.add_cleanup(checked.close)


class _Checked:
    """A plugin that is loaded when its first rule is checked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._subject: Subject | None = None

    def subject(self) -> Subject:
        from medrl.core.manager import PluginManager
        from medrl.core.testing.rules import Subject

        if self._subject is None:
            manager = PluginManager.create()
            self._subject = Subject(manager.load(self.name), manager)
        return self._subject

    def close(self) -> None:
        if self._subject is not None:
            self._subject.close()


class BrokenRule(Exception):
    """What a rule found."""


class RuleItem(pytest.Item):
    """One rule on one plugin."""

    def __init__(self, *, checked: _Checked, rule: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.checked, self.rule = checked, rule

    def runtest(self) -> None:
        """Check the rule."""
        from medrl.core.errors import PluginError
        from medrl.core.testing.rules import examine_rule

        try:
            subject = self.checked.subject()
        except PluginError as error:
            raise BrokenRule(f"{error}\n  do: {error.do}") from error
        if self.rule == LOADS:
            return
        outcome = examine_rule(self.rule, subject)
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        if outcome.findings:
            raise BrokenRule("\n".join(f"{item.what}\n  do: {item.do}" for item in outcome.findings))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show what was found, without a traceback."""
        if isinstance(excinfo.value, BrokenRule):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Say where the test is: in the rules of medrl."""
        return self.path, None, self.name
