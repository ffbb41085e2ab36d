"""Which plugins there are, without importing any: entry points of installed distributions, and plugins.toml.

`plugins.toml` is policy, not discovery: it switches plugins off or limits those of others, and cannot name
code. Its form::

    [settings]
    third_party = "listed"      # "all", "listed" (only those with a table below) or "none"

    [plugins.cine]
    enabled = true
    requires = ["h5py"]         # distributions that must be installed
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import click

from medrl.core.errors import ConfigError, PluginError, did_you_mean
from medrl.core.hookspecs import ENTRY_POINT_GROUP

POLICY_VARIABLE = "MEDRL_PLUGINS"
Status = Literal["available", "loaded", "broken", "disabled", "duplicate"]

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_THIRD_PARTY = ("all", "listed", "none")


@dataclass(frozen=True)
class PluginEntry:
    """One entry point of the group ``medrl.plugins``.

    Attributes:
        origin: ``bundled`` if medrl itself ships it.
        status: ``available`` until it is imported; then ``loaded`` or ``broken``. ``disabled`` by policy and
            ``duplicate`` are never imported.
        reason: Why it is broken, disabled or a duplicate, or why its observers are off.
        load_s: Seconds that importing and registering took; 0 until then.
        file: The file of the module, as far as it is known without importing.
    """

    name: str
    distribution: str
    version: str
    module: str
    origin: Literal["bundled", "third-party"]
    status: Status = "available"
    reason: str = ""
    load_s: float = 0.0
    file: str = ""

    @property
    def owner(self) -> str:
        """The distribution with its version, for messages."""
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True)
class Rule:
    """What plugins.toml says about one plugin."""

    enabled: bool = True
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """The contents of plugins.toml; without a file, everything installed is enabled.

    Attributes:
        path: The file, or None.
        flag: `third_party` was set by ``--no-third-party``.
        third_party: ``all``, ``listed`` or ``none``.
    """

    path: Path | None = None
    flag: bool = False
    third_party: str = "all"
    plugins: Mapping[str, Rule] = field(default_factory=dict)

    def refusal(self, entry: PluginEntry) -> str:
        """Return why the plugin may not be used, or an empty text."""
        rule = self.plugins.get(entry.name)
        if rule is not None and not rule.enabled:
            return f"switched off in {self.path}"
        if entry.origin == "third-party":
            if self.third_party == "none":
                where = "by --no-third-party" if self.flag else f"in {self.path}"
                return f"third-party plugins are switched off {where}"
            if self.third_party == "listed" and rule is None:
                return f"not listed in {self.path}; to allow it, add a line '[plugins.{entry.name}]' there"
        missing = [name for name in (rule.requires if rule else ()) if not _installed(name)]
        if missing:
            names = " ".join(missing)
            return f"requires {names}, which is not installed; run: pip install {names}"
        return ""


def find_policy(explicit: Path | None = None) -> Path | None:
    """Return the plugins.toml that applies.

    The first that exists of: the given file, the file named by ``$MEDRL_PLUGINS``, ``./plugins.toml``, and
    ``plugins.toml`` in the user's folder for medrl.

    Raises:
        ConfigError: A file was named and is not there.
    """
    by_variable = os.environ.get(POLICY_VARIABLE)
    for origin, named in (("--plugins-file", explicit), (f"${POLICY_VARIABLE}", by_variable)):
        if named:
            path = Path(named)
            if not path.is_file():
                raise ConfigError(f"plugin policy {path}", why=f"{origin} names a file that does not exist")
            return path
    for path in (Path("plugins.toml"), Path(click.get_app_dir("medrl")) / "plugins.toml"):
        if path.is_file():
            return path
    return None


def read_policy(path: Path) -> Policy:
    """Read plugins.toml.

    Raises:
        ConfigError: The file cannot be read or has unknown keys or wrong types; all problems are listed.
    """
    what = f"plugin policy {path}"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(what, why=f"cannot be read: {error}") from error
    problems = _unknown("", content, ("settings", "plugins"))
    third_party = "listed"
    settings = _table(content, "settings", problems)
    problems += _unknown("settings.", settings, ("third_party",))
    if "third_party" in settings:
        value = {True: "all", False: "none"}.get(settings["third_party"], settings["third_party"])
        if value in _THIRD_PARTY:
            third_party = value
        else:
            allowed = ", ".join(_THIRD_PARTY)
            problems.append(f"settings.third_party is {value!r}, expected {allowed}, true or false")
    tables = _table(content, "plugins", problems)
    rules = {name: _rule(name, _table(tables, name, problems, "plugins."), problems) for name in tables}
    if problems:
        raise ConfigError(what, why="it is not valid", problems=problems)
    return Policy(path=path, third_party=third_party, plugins=rules)


def discover(policy: Policy, *, strict: bool = False) -> list[PluginEntry]:
    """List all plugins that are installed, sorted by name, without importing one.

    Of several distributions that bring the same name, medrl's own is used; among others none is.

    Raises:
        PluginError: `strict`, and a name is brought twice.
    """
    found = {(item.name, item.module, item.distribution): item for item in map(_entry, _entry_points())}
    by_name: dict[str, list[PluginEntry]] = {}
    for item in found.values():
        by_name.setdefault(item.name, []).append(item)
    entries: list[PluginEntry] = []
    for name in sorted(by_name):
        allowed = []
        for item in by_name[name]:
            reason = policy.refusal(item) or _malformed(item)
            if reason:
                entries.append(replace(item, status="disabled", reason=reason))
            else:
                allowed.append(item)
        entries += _without_duplicates(allowed)
    duplicates = [item for item in entries if item.status == "duplicate"]
    if strict and duplicates:
        raise PluginError(f"plugin '{duplicates[0].name}'", why=duplicates[0].reason)
    return entries


def _without_duplicates(same_name: list[PluginEntry]) -> list[PluginEntry]:
    """Mark all entries of one name as duplicates but the bundled one."""
    if len(same_name) < 2:
        return same_name
    owners = " and ".join(f"'{item.owner}'" for item in sorted(same_name, key=lambda item: item.owner))
    kept = next((item for item in same_name if item.origin == "bundled"), None)
    end = f"; the one of {kept.distribution} is used" if kept else "; uninstall one of them"
    reason = f"brought by {owners}{end}"
    return [item if item is kept else replace(item, status="duplicate", reason=reason) for item in same_name]


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))


def _entry(point: importlib.metadata.EntryPoint) -> PluginEntry:
    distribution = point.dist
    name = distribution.metadata["Name"] if distribution else "unknown"
    return PluginEntry(
        name=point.name,
        distribution=name,
        version=distribution.version if distribution else "",
        module=point.value.replace(" ", ""),
        origin="bundled" if name.lower() == "medrl" else "third-party",
    )


def _malformed(entry: PluginEntry) -> str:
    if _NAME.fullmatch(entry.name):
        return ""
    return "the entry-point name must be lower-case letters, digits and underscores"


def locate(entry: PluginEntry) -> str:
    """Return the file of a plugin's module without importing anything; empty if it cannot be told."""
    if entry.file:
        return entry.file
    parts = entry.module.partition(":")[0].split(".")
    roots: list[Path] = []
    if entry.origin == "bundled" and parts[:2] == ["medrl", "plugins"]:
        roots, parts = [Path(__file__).resolve().parent.parent / "plugins"], parts[2:]
    else:
        try:
            spec = importlib.util.find_spec(parts[0])
        except (ImportError, ValueError, AttributeError):
            spec = None
        if spec is not None and len(parts) == 1:
            return spec.origin or ""
        if spec is not None:
            roots, parts = [Path(folder) for folder in spec.submodule_search_locations or ()], parts[1:]
    for root in roots:
        base = root.joinpath(*parts)
        for candidate in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if candidate.is_file():
                return str(candidate)
    return ""


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return True


def _unknown(prefix: str, table: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    return [f"unknown key '{prefix}{key}', {did_you_mean(key, known)}" for key in table if key not in known]


def _table(content: Mapping[str, Any], key: str, problems: list[str], prefix: str = "") -> Mapping[str, Any]:
    value = content.get(key, {})
    if isinstance(value, Mapping):
        return value
    problems.append(f"'{prefix}{key}' is {value!r}, expected a table")
    return {}


def _rule(name: str, table: Mapping[str, Any], problems: list[str]) -> Rule:
    prefix = f"plugins.{name}."
    problems += _unknown(prefix, table, ("enabled", "requires"))
    enabled = table.get("enabled", True)
    if not isinstance(enabled, bool):
        problems.append(f"{prefix}enabled is {enabled!r}, expected true or false")
    requires = table.get("requires", [])
    if not isinstance(requires, list) or not all(isinstance(item, str) for item in requires):
        problems.append(f"{prefix}requires is {requires!r}, expected a list of distribution names")
        requires = []
    return Rule(enabled=enabled is True, requires=tuple(requires))
