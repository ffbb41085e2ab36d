"""Checks that train nothing: import weight, registered parts, commands, config."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from medrl.core.errors import MedrlError, did_you_mean
from medrl.core.isolation import describe
from medrl.core.jobs import ConfigOption
from medrl.core.manager import LoadedPlugin, PluginManager
from medrl.core.registry import KINDS
from medrl.core.testing.findings import Finding, NotChecked

if TYPE_CHECKING:
    from medrl.core.config import MethodConfig

HEAVY = (
    "torch",
    "monai",
    "torchio",
    "nibabel",
    "numpy",
    "scipy",
    "skimage",
    "matplotlib",
    "gymnasium",
    "SimpleITK",
    "pydicom",
    "h5py",
    "pandas",
)
"""Modules that cost a large part of a second; `plugin.py` and `commands.py` import none at module level."""

_SHARED = ("medrl", "method", "data.", "train.")


def check_import_weight(plugin: LoadedPlugin, manager: PluginManager) -> list[Finding]:
    """Import the light modules in a fresh interpreter each and report what they drag in."""
    findings = []
    front = plugin.entry.module.partition(":")[0]
    for module, forbidden in [
        (front, (*HEAVY, "pydantic")),
        *((module, HEAVY) for module in plugin.commands.modules() if module != front),
    ]:
        found = _imported_by(module, forbidden)
        if isinstance(found, str):
            findings.append(
                Finding("import weight", f"importing {module} alone fails: {found}", f"mend {module}")
            )
        elif found:
            findings.append(
                Finding(
                    "import weight",
                    f"importing {module} imports {', '.join(found)}",
                    "import them inside the functions that use them",
                )
            )
    return findings


def check_parts(plugin: LoadedPlugin, manager: PluginManager) -> list[Finding]:
    """Resolve every registered part."""
    findings = []
    count = 0
    for kind in KINDS:
        registry = manager.registry(kind)
        for entry in registry.entries():
            if entry.plugin != plugin.name:
                continue
            count += 1
            try:
                registry.get(entry.key)
            except MedrlError as error:
                findings.append(Finding("parts", str(error), f"mend or remove '{entry.location}'"))
            if not isinstance(entry.target, str):
                findings.append(
                    Finding(
                        "parts",
                        f"'{entry.key}' of {kind} is registered as an object",
                        f"use '{entry.location}'",
                    )
                )
    if not count:
        raise NotChecked("it registers no parts")
    return findings


def check_commands(plugin: LoadedPlugin, manager: PluginManager) -> list[Finding]:
    """Resolve the commands and check their options and callbacks."""
    findings = []
    commands = plugin.commands
    if not commands.provided() and not commands.count_tools():
        raise NotChecked("it registers no commands")
    if commands.eager():
        findings.append(
            Finding(
                "commands",
                f"registered as objects: {', '.join(commands.eager())}",
                "name them as 'module:attribute'",
            )
        )
    resolved: dict[str, click.Command] = {}
    for kind in ["tools", *commands.provided()]:
        try:
            found = getattr(commands, kind)
        except MedrlError as error:
            findings.append(Finding("commands", str(error), "correct the name in medrl_register_commands"))
            continue
        if isinstance(found, click.Command):
            resolved[kind] = found
        elif isinstance(found, dict):
            findings += [
                Finding("commands", f"tool '{tool}' has no help text", "give the command a docstring")
                for tool, command in found.items()
                if not (command.help or "").strip()
            ]
    keys = _config_keys(plugin, manager)
    for kind, command in resolved.items():
        if kind != "evaluate":  # it is an ordinary command; the others receive a job
            findings += _callback_findings(kind, command)
        findings += _option_findings(kind, command, keys)
    if "train" in resolved and not plugin.info.config:
        findings.append(
            Finding(
                "commands",
                "there is a train command but no config model",
                "set PluginInfo.config to 'module:Class'",
            )
        )
    return findings


def check_config(plugin: LoadedPlugin, manager: PluginManager) -> list[Finding]:
    """Compare the config model with ``defaults.yaml``, and validate the presets."""
    if not plugin.info.config:
        raise NotChecked("it has no config model")
    from medrl.core.config import config_model, flatten, known_keys, parse_yaml, presets, resolve_method

    try:
        model = config_model(manager, plugin.name)
        files = presets(manager, plugin.name)
    except (MedrlError, ImportError) as error:
        return [
            Finding("config", describe(error), "set PluginInfo.config to 'module:Class' of a MethodConfig")
        ]
    except Exception as error:  # noqa: BLE001 - the module of a plugin may raise anything
        return [
            Finding("config", f"importing {plugin.info.config} failed: {describe(error)}", "mend the module")
        ]
    if "defaults" not in files:
        return [
            Finding(
                "config", "there is no defaults.yaml beside the config model", "write it with every value"
            )
        ]
    findings = []
    for preset in [None, *sorted(set(files) - {"defaults"})]:
        try:
            resolve_method(manager, plugin.name, preset=preset)
        except MedrlError as error:
            where = f"preset_{preset}.yaml over defaults.yaml" if preset else "defaults.yaml"
            findings.append(Finding("config", f"{where}: {error}", "correct the file"))
    if findings:
        return findings
    written = set(flatten(parse_yaml(files["defaults"], origin="defaults.yaml")))
    for key in known_keys(model):
        if not key.startswith(_SHARED) and not _covered(key, written):
            findings.append(
                Finding(
                    "config",
                    f"defaults.yaml lacks '{key}'",
                    "add it with its value and a comment on its source",
                )
            )
    findings += [
        Finding(
            "config", f"the field '{key}' of the config model has no description", "write it below the field"
        )
        for key in _undescribed(model)
    ]
    return findings


def _imported_by(module: str, forbidden: Sequence[str]) -> list[str] | str:
    """Return which forbidden modules importing `module` brings, or the last line of its failure."""
    code = (
        "import importlib, json, sys; importlib.import_module(sys.argv[1]);"
        "print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(  # noqa: S603 - this interpreter, with arguments of our own
        [sys.executable, "-c", code, module, *forbidden],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def _config_keys(plugin: LoadedPlugin, manager: PluginManager) -> list[str]:
    """Return the keys of the config model; empty without a usable one, which `check_config` reports."""
    if not plugin.info.config:
        return []
    from medrl.core.config import config_model, known_keys

    try:
        return known_keys(config_model(manager, plugin.name))
    except Exception:  # noqa: BLE001 - reported by check_config
        return []


def _callback_findings(kind: str, command: click.Command) -> list[Finding]:
    """Check that the callback takes the job first, and every option that is no config key."""
    if command.callback is None:
        return [
            Finding(
                "commands", f"the {kind} command has no callback", "decorate a function with click.command"
            )
        ]
    parameters = list(inspect.signature(command.callback).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in positional:
        return [Finding("commands", f"the {kind} command takes no job", f"write 'def {kind}(job): ...'")]
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters):
        return []
    taken = {item.name for item in parameters[1:]}
    own = {
        item.name
        for item in command.params
        if item.expose_value and item.name and not isinstance(item, ConfigOption)
    }
    return [
        *(
            Finding(
                "commands",
                f"the {kind} command does not take its option '{name}'",
                f"add the argument '{name}'",
            )
            for name in sorted(own - taken)
        ),
        *(
            Finding(
                "commands",
                f"the {kind} command waits for '{item.name}', which is no option of it",
                "values of config options arrive in job.config; remove the argument",
            )
            for item in parameters[1:]
            if item.name not in own and item.default is inspect.Parameter.empty
        ),
    ]


def _option_findings(kind: str, command: click.Command, keys: list[str]) -> list[Finding]:
    """Check that every config option names a key of the config model."""
    if not keys:
        return []
    open_blocks = tuple(key.removesuffix("name") for key in keys if key.endswith(".name"))
    return [
        Finding(
            "commands",
            f"option '{option.opts[0]}' of {kind} is for the unknown config key '{option.config_key}'",
            did_you_mean(option.config_key, keys),
        )
        for option in command.params
        if isinstance(option, ConfigOption)
        and option.config_key not in keys
        and not option.config_key.startswith(open_blocks or ("\0",))
    ]


def _covered(key: str, written: Iterable[str]) -> bool:
    """Say whether a key, a block around it or a part of it is written; a block may be null as a whole."""
    return any(key == item or key.startswith(f"{item}.") or item.startswith(f"{key}.") for item in written)


def _undescribed(model: type[MethodConfig]) -> list[str]:
    """Return the dotted own keys without a description."""
    from pydantic import BaseModel

    def walk(block: type[BaseModel], prefix: str) -> Iterable[str]:
        for name, field in block.model_fields.items():
            if not prefix and f"{name}." in _SHARED:
                continue
            if not (field.description or "").strip():
                yield f"{prefix}{name}"
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from walk(inner, f"{prefix}{name}.")

    return list(walk(model, ""))
