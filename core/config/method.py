"""A method's config: its model, its presets, and all layers resolved."""

from __future__ import annotations

import importlib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medrl.core.config.blocks import MethodConfig
from medrl.core.config.layers import Layer, Resolved, resolve
from medrl.core.config.strict_yaml import load_yaml, parse_yaml
from medrl.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager


def config_model(manager: PluginManager, method: str) -> type[MethodConfig]:
    """Import the config model that a plugin names in its `PluginInfo`.

    Raises:
        ConfigError: The plugin is no trainable method, or its config model is not a `MethodConfig`.
    """
    target = manager.info(method).config
    if not target:
        raise ConfigError(f"method '{method}'", why="this plugin registers parts but has no config to train")
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"config model {target} of '{method}'", why=str(error)) from error
    if not (isinstance(found, type) and issubclass(found, MethodConfig)):
        raise ConfigError(f"config model {target} of '{method}'", why="it must derive from MethodConfig")
    return found


def presets(manager: PluginManager, method: str) -> dict[str, str]:
    """Return the presets of a method: name to YAML text; ``defaults`` is among them."""
    package = manager.info(method).config.partition(":")[0].rpartition(".")[0]
    found: dict[str, str] = {}
    for item in importlib.resources.files(package).iterdir():
        if item.name == "defaults.yaml":
            found["defaults"] = item.read_text(encoding="utf-8")
        elif item.name.startswith("preset_") and item.name.endswith(".yaml"):
            found[item.name.removeprefix("preset_").removesuffix(".yaml")] = item.read_text(encoding="utf-8")
    return found


def resolve_method(
    manager: PluginManager,
    method: str,
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    layers: Sequence[Layer] = (),
) -> Resolved[Any]:
    """Resolve a method's config: defaults.yaml < preset < file < the given layers.

    Raises:
        ConfigError: Unknown preset, wrong method in the file, or any invalid value; all problems at once.
    """
    model = config_model(manager, method)
    available = presets(manager, method)
    stack = [Layer("defaults.yaml", parse_yaml(available.get("defaults", ""), origin="defaults.yaml"))]
    if preset is not None:
        if preset not in available or preset == "defaults":
            names = sorted(set(available) - {"defaults"})
            raise ConfigError(f"preset '{preset}' of {method}", why="unknown", do=did_you_mean(preset, names))
        stack.append(Layer(f"preset {preset}", parse_yaml(available[preset], origin=f"preset {preset}")))
    if config_file is not None:
        values = load_yaml(config_file)
        other = values.get("method", method)
        if other != method:
            raise ConfigError(
                str(config_file),
                why=f"it is for method '{other}', not '{method}'",
                do=f"medrl train {other} -c FILE",
            )
        stack.append(Layer(config_file.name, values, base_dir=config_file.resolve().parent))
    return resolve(model, [*stack, *layers])
