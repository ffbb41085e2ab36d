"""Registries: the parts that plugins offer to each other by key, such as the model ``graft.tiny``.

A part is registered by name as ``"module:attribute"`` and imported when it is first asked for. Keys begin
with the name of their plugin, so that no plugin can replace the part of another.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from medrl.core.errors import ConfigError, MedrlError, PluginError, did_you_mean
from medrl.core.isolation import describe, plugin_code

T = TypeVar("T")

KINDS = ("models", "losses", "agents", "environments", "rewards", "metrics", "datasets")
"""What can be registered; `medrl_register_<kind>` is the hook of each."""

BASES = {
    "models": "torch.nn:Module",
    "losses": "",
    "agents": "",
    "environments": "medrl.core.rl.env:BatchedEnv",
    "rewards": "",
    "metrics": "",
    "datasets": "",
}
"""The class or protocol of the parts of a kind, as ``"module:attribute"``; empty for any callable."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def import_target(target: str, *, what: str, do: str = "") -> Any:
    """Import ``"module:attribute"``; whatever goes wrong becomes one PluginError.

    Args:
        target: Module and attribute, as checked by `check_target`.
        what: Names the part in the error message.
        do: The advice in the error message.

    Raises:
        PluginError: The module cannot be imported, or lacks the attribute.
    """
    module_name, _, attribute = target.partition(":")
    with plugin_code(what, f"importing '{module_name}'", do=do, module=module_name):
        found: Any = importlib.import_module(module_name)
    seen = module_name
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in dir(found) if not name.startswith("_")]
            raise PluginError(what, why=f"'{seen}' has no '{part}', {did_you_mean(part, public)}", do=do)
        found = getattr(found, part)
        seen = f"{seen}.{part}"
    return found


def check_target(target: str, *, what: str) -> None:
    """Refuse a target that is not ``"module:attribute"``.

    Raises:
        PluginError: The text has another form.
    """
    if not _TARGET.fullmatch(target):
        raise PluginError(what, why=f"expected 'module:attribute', got {target!r}")


@dataclass(frozen=True)
class Entry:
    """One registered part.

    Attributes:
        key: ``<plugin>.<name>``.
        target: ``"module:attribute"``, or the callable itself.
        summary: One line for people.
        plugin: The plugin that registered it.
    """

    key: str
    target: str | Callable[..., Any]
    summary: str
    plugin: str

    @property
    def location(self) -> str:
        """The target as ``"module:attribute"``."""
        if isinstance(self.target, str):
            return self.target
        module = getattr(self.target, "__module__", "?")
        return f"{module}:{getattr(self.target, '__qualname__', repr(self.target))}"


class Registry(Generic[T]):
    """The parts of one kind, by key.

    Args:
        kind: Plural name of the kind, such as ``models``.
        base: ``"module:attribute"`` of the class that every part must derive from, imported when the first
            part is asked for; empty means any callable.
    """

    def __init__(self, kind: str, base: str = "") -> None:
        self.kind = kind
        self.base = base
        self._entries: dict[str, Entry] = {}
        self._resolved: dict[str, Callable[..., T]] = {}

    def recorder(self, plugin: str) -> Recorder[T]:
        """Return the recorder of one plugin; its keys begin with the plugin's name."""
        return Recorder(self, plugin)

    def keys(self) -> list[str]:
        """Return all keys, sorted."""
        return sorted(self._entries)

    def entries(self) -> list[Entry]:
        """Return all entries, sorted by key."""
        return [self._entries[key] for key in self.keys()]

    def discard(self, plugin: str) -> None:
        """Forget everything that a plugin registered."""
        for key in [key for key, entry in self._entries.items() if entry.plugin == plugin]:
            del self._entries[key]
            self._resolved.pop(key, None)

    def get(self, key: str) -> Callable[..., T]:
        """Return the class or factory of a key.

        Raises:
            ConfigError: No such key; near matches are named.
            PluginError: The target cannot be imported, or is no part of this kind.
        """
        if key in self._resolved:
            return self._resolved[key]
        what = f"{self._singular} '{key}'"
        entry = self._entries.get(key)
        if entry is None:
            raise ConfigError(what, why=f"unknown key, {did_you_mean(key, self._entries)}")
        target: Any = entry.target
        if isinstance(target, str):
            target = import_target(target, what=what, do=f"repair or update the plugin '{entry.plugin}'")
        self._check(target, what=what, location=entry.location)
        resolved = cast(Callable[..., T], target)
        self._resolved[key] = resolved
        return resolved

    def build(self, key: str, /, **params: Any) -> T:
        """Build the part of a key with keyword parameters.

        Raises:
            ConfigError: A parameter is unknown or missing, or the part refuses the values.
            PluginError: The part is defective, or a factory returned something else than this kind.
        """
        target = self.get(key)
        what = f"{self._singular} '{key}'"
        problems = _parameter_problems(target, params)
        if problems:
            raise ConfigError(what, why="its parameters do not fit", problems=problems)
        try:
            made = target(**params)
        except MedrlError:
            raise
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(what, why=f"refused its parameters: {describe(error)}") from error
        base = self._base()
        if base is None or isinstance(target, type):
            return made
        wrong = _missing_methods(base, made) if _is_protocol(base) else not isinstance(made, base)
        if wrong:
            why = f"expected a {base.__qualname__}, the factory made a {type(made).__name__}"
            raise PluginError(what, why=why)
        return made

    @property
    def _singular(self) -> str:
        return {"losses": "loss"}.get(self.kind, self.kind.removesuffix("s"))

    def _base(self) -> Any:
        return import_target(self.base, what=f"registry '{self.kind}'") if self.base else None

    def _check(self, target: object, *, what: str, location: str) -> None:
        """Refuse a target that cannot be a part of this kind."""
        if not callable(target):
            why = f"'{location}' is a {type(target).__name__}, expected a class or a function"
            raise PluginError(what, why=why)
        base = self._base()
        if base is None or not isinstance(target, type):
            return
        if _is_protocol(base):
            missing = _missing_methods(base, target)
            if missing:
                raise PluginError(what, why=f"'{location}' lacks {missing} of {base.__qualname__}")
        elif not issubclass(target, base):
            why = f"'{location}' does not derive from {base.__module__}.{base.__qualname__}"
            raise PluginError(what, why=why)

    def _add(self, entry: Entry) -> None:
        known = self._entries.get(entry.key)
        if known is not None:
            raise PluginError(
                f"{self._singular} '{entry.key}'",
                why=f"registered twice: '{known.location}' by plugin '{known.plugin}' and "
                f"'{entry.location}' by plugin '{entry.plugin}'",
            )
        self._entries[entry.key] = entry


class Recorder(Generic[T]):
    """What a registration hook receives: adds parts to one registry in the name of one plugin."""

    def __init__(self, registry: Registry[T], plugin: str) -> None:
        self._registry = registry
        self._plugin = plugin

    @property
    def kind(self) -> str:
        """The kind of part that is recorded, such as ``models``."""
        return self._registry.kind

    def add(self, name: str, target: str | Callable[..., T], *, summary: str) -> None:
        """Add one part; its key becomes ``<plugin>.<name>``.

        Args:
            name: Lower-case letters, digits and underscores.
            target: ``"module:attribute"``, imported when it is first asked for, or a callable.
            summary: One line for people.

        Raises:
            PluginError: The name or the target is malformed, or the name is taken.
        """
        what = f"plugin '{self._plugin}', {self._registry.kind}"
        if not _NAME.fullmatch(name):
            raise PluginError(
                what,
                why=f"name {name!r} must be lower-case letters, digits and underscores",
                do="leave out the plugin's name; it is put in front",
            )
        what = f"{what}, '{name}'"
        if isinstance(target, str):
            check_target(target, what=what)
        elif not callable(target):
            raise PluginError(what, why=f"expected 'module:attribute' or a callable, got {target!r}")
        if not summary.strip():
            raise PluginError(what, why="the summary is empty", do="say in one line what it is")
        self._registry._add(Entry(f"{self._plugin}.{name}", target, summary.strip(), self._plugin))


def _is_protocol(base: object) -> bool:
    return bool(getattr(base, "_is_protocol", False))


def _missing_methods(base: type, candidate: object) -> str:
    """Return the public methods of a protocol, its parents included, that a class or an object lacks."""
    methods = {
        name
        for owner in base.__mro__
        if _is_protocol(owner)
        for name, value in vars(owner).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    return ", ".join(sorted(name for name in methods if not callable(getattr(candidate, name, None))))


def _parameter_problems(target: Callable[..., Any], params: dict[str, Any]) -> list[str]:
    """Return one sentence for each parameter that the signature does not know or that it misses."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature: the call itself will tell
        return []
    named = {
        item.name: item
        for item in parameters
        if item.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    problems = []
    if not any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters):
        problems += [
            f"unknown parameter '{name}', {did_you_mean(name, named)}" for name in params if name not in named
        ]
    problems += [
        f"missing parameter '{name}'"
        for name, item in named.items()
        if item.default is inspect.Parameter.empty and name not in params
    ]
    return problems
