"""The plugin manager: lists plugins without importing them, loads each in isolation, and calls their hooks.

One broken plugin never stops the tool: it is shown with its reason, and only naming it fails. Each plugin
has a pluggy manager of its own, so that an exception, a wrong signature or a misspelt hook is told of that
plugin alone. There is no sandbox: an installed and enabled plugin runs with the rights of the user.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import click
import pluggy

from medrl.core import hookspecs
from medrl.core.discovery import (
    PluginEntry,
    Policy,
    discover,
    find_policy,
    locate,
    read_policy,
)
from medrl.core.errors import ConfigError, MedrlError, PluginError, did_you_mean
from medrl.core.isolation import ANYTHING, CtrlC, describe, plugin_code, telling_ctrl_c
from medrl.core.registry import BASES, KINDS, Entry, Registry, check_target, import_target
from medrl.core.types import PLUGIN_API, PluginInfo

__all__ = [
    "CommandRecorder",
    "Commands",
    "LazyRegistry",
    "LoadedPlugin",
    "PluginEntry",
    "PluginManager",
    "Policy",
]

STRICT_VARIABLE = "MEDRL_PLUGINS_STRICT"
HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("medrl_"))
"""Names of all hooks."""

SLOW_S = 2.0
"""Seconds of importing above which a plugin is called slow."""

T = TypeVar("T")
_log = logging.getLogger("medrl.plugins")


class CommandRecorder:
    """What `medrl_register_commands` receives: takes click commands, or their ``"module:attribute"``."""

    def __init__(self, plugin: str) -> None:
        self._plugin = plugin
        self.main: dict[str, str | click.Command] = {}
        self.tools: list[str | click.Command] = []

    def train(self, target: str | click.Command) -> None:
        """Name the command behind ``medrl train <method>``; its callback receives a `TrainJob`."""
        self._set("train", target)

    def predict(self, target: str | click.Command) -> None:
        """Name the command behind ``medrl predict <method>``; its callback receives a `PredictJob`."""
        self._set("predict", target)

    def evaluate(self, target: str | click.Command) -> None:
        """Name the command that evaluates a method in its own way."""
        self._set("evaluate", target)

    def demo(self, target: str | click.Command) -> None:
        """Name the command behind ``medrl demo <method>``; its callback receives a `DemoJob`."""
        self._set("demo", target)

    def tool(self, target: str | click.Command) -> None:
        """Name one command that appears as ``medrl <method> <tool>``."""
        self._check("tool", target)
        self.tools.append(target)

    def _set(self, kind: str, target: str | click.Command) -> None:
        self._check(kind, target)
        if kind in self.main:
            raise PluginError(f"plugin '{self._plugin}', command {kind}", why="registered twice")
        self.main[kind] = target

    def _check(self, kind: str, target: object) -> None:
        what = f"plugin '{self._plugin}', command {kind}"
        if isinstance(target, str):
            check_target(target, what=what)
        elif not isinstance(target, click.Command):
            raise PluginError(what, why=f"expected 'module:attribute' or a click command, got {target!r}")


class Commands:
    """The click commands of one plugin; each is imported when it is asked for."""

    def __init__(self, plugin: str, recorder: CommandRecorder) -> None:
        self._plugin = plugin
        self._recorder = recorder

    @cached_property
    def train(self) -> click.Command | None:
        """The train command, or None."""
        return self._main("train")

    @cached_property
    def predict(self) -> click.Command | None:
        """The predict command, or None."""
        return self._main("predict")

    @cached_property
    def evaluate(self) -> click.Command | None:
        """The evaluate command, or None."""
        return self._main("evaluate")

    @cached_property
    def demo(self) -> click.Command | None:
        """The demo command, or None."""
        return self._main("demo")

    @cached_property
    def tools(self) -> dict[str, click.Command]:
        """The tools by name."""
        found: dict[str, click.Command] = {}
        for target in self._recorder.tools:
            command = self._resolve("tool", target)
            name = command.name or ""
            if not name or name in found:
                why = f"two tools are named '{name}'" if name else f"{target} has no name"
                raise PluginError(f"plugin '{self._plugin}', tools", why=why)
            found[name] = command
        return found

    def provided(self) -> list[str]:
        """Return which of train, predict, evaluate and demo the plugin has; imports nothing."""
        return [kind for kind in ("train", "predict", "evaluate", "demo") if kind in self._recorder.main]

    def modules(self) -> list[str]:
        """Return the modules that the commands lie in, as far as they are named; imports nothing."""
        targets = [*self._recorder.main.values(), *self._recorder.tools]
        return sorted({target.partition(":")[0] for target in targets if isinstance(target, str)})

    def count_tools(self) -> int:
        """Return how many tools the plugin has; imports nothing."""
        return len(self._recorder.tools)

    def eager(self) -> list[str]:
        """Return the names of commands that were registered as objects instead of ``"module:attribute"``."""
        targets = [*self._recorder.main.values(), *self._recorder.tools]
        return sorted(target.name or "?" for target in targets if isinstance(target, click.Command))

    def _main(self, kind: str) -> click.Command | None:
        target = self._recorder.main.get(kind)
        return None if target is None else self._resolve(kind, target)

    def _resolve(self, kind: str, target: str | click.Command) -> click.Command:
        what = f"plugin '{self._plugin}', command {kind}"
        found = import_target(target, what=what) if isinstance(target, str) else target
        if not isinstance(found, click.Command):
            raise PluginError(what, why=f"{target} is a {type(found).__name__}, expected a click command")
        return found


@dataclass(frozen=True, eq=False)
class LoadedPlugin:
    """A plugin that was imported and registered its parts."""

    name: str
    info: PluginInfo
    module: Any
    entry: PluginEntry
    commands: Commands
    hooks: pluggy.PluginManager = field(repr=False)


class LazyRegistry(Generic[T]):
    """The parts of one kind; asking for ``graft.tiny`` loads the plugin ``graft`` first."""

    def __init__(self, manager: PluginManager, registry: Registry[T]) -> None:
        self._manager = manager
        self._registry = registry

    @property
    def kind(self) -> str:
        """Plural name of the kind, such as ``models``."""
        return self._registry.kind

    def get(self, key: str) -> Any:
        """Return the class or factory of a key.

        Raises:
            ConfigError: No such key, or no plugin of its prefix; near matches are named.
            PluginError: The plugin, or this part of it, is broken or disabled.
        """
        self._load(key)
        return self._registry.get(key)

    def build(self, key: str, /, **params: Any) -> T:
        """Build the part of a key with keyword parameters; see `Registry.build`."""
        self._load(key)
        return self._registry.build(key, **params)

    def fit(self, key: str, offered: Mapping[str, Any], /, **params: Any) -> T:
        """Build the part of a key with its own parameters, and with those of the offered ones that it takes.

        So a method gives what it has (channels, spaces, numbers of classes) to a part that it does not know.

        Args:
            key: ``<plugin>.<name>``.
            offered: Values that a part may take by name; `params` go before them.
            params: Parameters of the part; one that it does not know is an error, see `Registry.build`.
        """
        taken = inspect.signature(self.get(key)).parameters
        every = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in taken.values())
        given = {name: value for name, value in offered.items() if every or name in taken}
        return self.build(key, **{**given, **params})

    def keys(self) -> list[str]:
        """Return the keys of all plugins that load."""
        self._manager.load_all()
        return self._registry.keys()

    def entries(self) -> list[Entry]:
        """Return the entries of all plugins that load."""
        self._manager.load_all()
        return self._registry.entries()

    def _load(self, key: str) -> None:
        plugin, dot, _ = key.partition(".")
        what = f"key '{key}' of {self.kind}"
        if not dot:
            near = [known for known in self.keys() if known.partition(".")[2] == key] or self.keys()
            raise ConfigError(what, why=f"expected 'plugin.name', {did_you_mean(key, near)}")
        if not self._manager.knows(plugin):
            raise ConfigError(what, why=f"there is no plugin '{plugin}', {did_you_mean(key, self.keys())}")
        self._manager.load(plugin)


class PluginManager:
    """All plugins of this installation under one policy.

    Make one with `create`; nothing is imported before it is needed.
    """

    def __init__(self, entries: list[PluginEntry], *, policy: Policy, strict: bool = False) -> None:
        self.policy = policy
        self.strict = strict
        self._entries = list(entries)
        self._loaded: dict[str, LoadedPlugin] = {}
        self._errors: dict[str, PluginError] = {}
        self._muted: dict[str, str] = {}
        self._registries: dict[str, Registry[Any]] = {kind: Registry(kind, BASES[kind]) for kind in KINDS}

    @classmethod
    def create(
        cls, *, plugins_file: Path | None = None, third_party: bool = True, strict: bool | None = None
    ) -> PluginManager:
        """List the installed plugins under the policy that applies.

        Args:
            plugins_file: A plugins.toml; otherwise `discovery.find_policy` searches one.
            third_party: False leaves out all plugins that medrl does not ship.
            strict: Raise at the first plugin that is broken or brought twice; by default the environment
                variable ``MEDRL_PLUGINS_STRICT`` decides.

        Raises:
            ConfigError: The policy file is missing or invalid.
        """
        path = find_policy(plugins_file)
        policy = read_policy(path) if path else Policy()
        if not third_party:
            policy = replace(policy, third_party="none", flag=True)
        if strict is None:
            strict = os.environ.get(STRICT_VARIABLE, "") not in ("", "0")
        return cls(discover(policy, strict=strict), policy=policy, strict=strict)

    def names(self) -> list[str]:
        """Return the names of the enabled plugins; nothing is imported."""
        return [entry.name for entry in self._entries if entry.status in ("available", "loaded", "broken")]

    def knows(self, name: str) -> bool:
        """Say whether a plugin of this name is installed, in whatever state."""
        return any(entry.name == name for entry in self._entries)

    def entries(self) -> list[PluginEntry]:
        """Return all plugins with their state, also those that are disabled, broken or duplicates."""
        found = []
        for entry in self._entries:
            muted = self._muted.get(entry.name, "") if entry.status == "loaded" else ""
            found.append(replace(entry, file=locate(entry), reason=muted or entry.reason))
        return found

    def load(self, name: str) -> LoadedPlugin:
        """Import a plugin and let it register its parts; a second call returns the same object.

        Raises:
            PluginError: Unknown, disabled, a duplicate, or broken; it says why.
        """
        if name in self._loaded:
            return self._loaded[name]
        if name in self._errors:
            raise self._errors[name]
        entry = self._usable(name)
        start = time.perf_counter()
        try:
            loaded = self._load(entry)
        except PluginError as error:
            for registry in self._registries.values():
                registry.discard(name)
            self._errors[name] = error
            self._replace(entry, status="broken", reason=error.why, load_s=time.perf_counter() - start)
            raise
        self._loaded[name] = loaded
        file = getattr(loaded.module, "__file__", None) or ""
        took = time.perf_counter() - start
        reason = f"slow: importing it took {took:.1f} s of every command" if took > SLOW_S else ""
        self._replace(entry, status="loaded", reason=reason, load_s=took, file=file)
        return loaded

    def load_all(self) -> None:
        """Load every enabled plugin; one that fails is marked as broken and the others go on.

        Raises:
            PluginError: Only if the manager is strict.
        """
        for name in self.names():
            if name in self._errors and not self.strict:
                continue
            try:
                self.load(name)
            except PluginError:
                if self.strict:
                    raise

    def load_observers(self) -> None:
        """Load every enabled plugin, so that its observers see the run that begins."""
        self.load_all()

    def info(self, name: str) -> PluginInfo:
        """Return what a plugin says about itself.

        Raises:
            PluginError: The plugin cannot be loaded.
        """
        return self.load(name).info

    def registry(self, kind: str) -> LazyRegistry[Any]:
        """Return the parts of one kind, such as ``models``.

        Raises:
            ConfigError: There is no such kind.
        """
        if kind not in self._registries:
            raise ConfigError(f"registry '{kind}'", why=f"unknown kind, {did_you_mean(kind, KINDS)}")
        return LazyRegistry(self, self._registries[kind])

    def commands(self, name: str) -> Commands:
        """Return the click commands of a plugin.

        Raises:
            PluginError: The plugin cannot be loaded.
        """
        return self.load(name).commands

    def notify(self, hook: str, **kwargs: Any) -> None:
        """Tell the observers of all loaded plugins; one that raises is switched off with one warning.

        Raises:
            ValueError: `hook` is no observer.
        """
        if hook not in hookspecs.OBSERVERS:
            raise ValueError(f"'{hook}' is no observer, {did_you_mean(hook, hookspecs.OBSERVERS)}")
        for name, plugin in sorted(self._loaded.items()):
            if name in self._muted:
                continue
            try:
                with telling_ctrl_c():
                    getattr(plugin.hooks.hook, hook)(**kwargs)
            except CtrlC:
                raise
            except ANYTHING as error:
                self._muted[name] = f"its observers are off, because {hook} failed: {describe(error)}"
                _log.warning("plugin '%s': %s", name, self._muted[name])

    def _usable(self, name: str) -> PluginEntry:
        same = [entry for entry in self._entries if entry.name == name]
        for entry in same:
            if entry.status in ("available", "loaded", "broken"):
                return entry
        if same:
            why = f"{same[0].status}: {same[0].reason}"
            raise PluginError(f"plugin '{name}'", why=why, do="medrl plugins list")
        if name in self.policy.plugins:
            why = f"listed in {self.policy.path} but not installed"
            raise PluginError(f"plugin '{name}'", why=why, do="pip install the plugin")
        raise PluginError(
            f"plugin '{name}'",
            why=f"there is no plugin of this name, {did_you_mean(name, self.names())}",
            do="medrl plugins list",
        )

    def _replace(self, entry: PluginEntry, **changes: Any) -> None:
        self._entries[self._entries.index(entry)] = replace(entry, **changes)

    def _load(self, entry: PluginEntry) -> LoadedPlugin:
        what = f"plugin '{entry.name}' of {entry.owner}"
        do = f"pip install --upgrade --force-reinstall {entry.distribution}"
        module = _import(entry, what=what, do=do)
        hooks = _pluggy_manager(entry, module, what=what, do=f"repair {locate(entry) or entry.module}")
        with plugin_code(what, "medrl_plugin_info", do=do):
            info = hooks.hook.medrl_plugin_info()
        info = _checked_info(entry, info, what=what)
        recorder = CommandRecorder(entry.name)
        offered: dict[str, dict[str, Any]] = {"medrl_register_commands": {"commands": recorder}}
        for kind, registry in self._registries.items():
            offered[f"medrl_register_{kind}"] = {"registry": registry.recorder(entry.name)}
        for hook, arguments in offered.items():
            with plugin_code(what, hook, do=do, distribution=entry.distribution):
                getattr(hooks.hook, hook)(**arguments)
        return LoadedPlugin(entry.name, info, module, entry, Commands(entry.name, recorder), hooks)


def _import(entry: PluginEntry, *, what: str, do: str) -> Any:
    """Import the module, or the object in a module, that an entry point names."""
    if ":" in entry.module:
        return import_target(entry.module, what=what, do=do)
    with plugin_code(what, f"importing {entry.module}", do=do, distribution=entry.distribution):
        return importlib.import_module(entry.module)


def _pluggy_manager(entry: PluginEntry, module: Any, *, what: str, do: str) -> pluggy.PluginManager:
    """Register one plugin with a pluggy manager of its own and check the names and arguments of its hooks."""
    hooks = pluggy.PluginManager(hookspecs.PROJECT)
    hooks.add_hookspecs(hookspecs)
    try:
        hooks.register(module, name=entry.name)
    except pluggy.PluginValidationError as error:
        raise PluginError(what, why=_signature_problem(str(error)), do=do) from error
    problems = []
    for implementation in hooks.get_hookcallers(module) or []:
        name = implementation.name
        if name not in HOOKS:
            problems.append(f"there is no hook '{name}', {did_you_mean(name, HOOKS)}")
    for name in (name for name in dir(module) if name.startswith("medrl_")):
        if callable(getattr(module, name)) and hooks.parse_hookimpl_opts(module, name) is None:
            problems.append(f"'{name}' is not marked with @hookimpl")
    if problems:
        raise PluginError(what, why="; ".join(problems), do=do)
    return hooks


def _signature_problem(message: str) -> str:
    """Return pluggy's many-line complaint about arguments as one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "a hook has a wrong signature: " + "; ".join(lines[1:] or lines)


def _checked_info(entry: PluginEntry, info: object, *, what: str) -> PluginInfo:
    """Refuse a plugin that does not say who it is, or was written for another plugin API."""
    if not isinstance(info, PluginInfo):
        found = "nothing" if info is None else type(info).__name__
        raise PluginError(what, why=f"medrl_plugin_info must return a PluginInfo, it returned {found}")
    if info.api != PLUGIN_API:
        newer = isinstance(info.api, int) and info.api > PLUGIN_API
        do = "pip install --upgrade medrl" if newer else f"pip install --upgrade {entry.distribution}"
        raise PluginError(what, why=f"written for plugin API {info.api}, this medrl has {PLUGIN_API}", do=do)
    if info.name != entry.name:
        raise PluginError(what, why=f"it calls itself '{info.name}', its entry point says '{entry.name}'")
    if not info.summary.strip():
        raise PluginError(what, why="its PluginInfo has no summary")
    return info if info.version else replace(info, version=entry.version)


def errors_of(manager: PluginManager) -> dict[str, MedrlError]:
    """Load everything and return the error of each plugin that is broken."""
    manager.load_all()
    return dict(manager._errors)
