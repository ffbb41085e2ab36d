"""Configuration: strict YAML, layers with the origin of every value, and frozen validated models.

Imported on use only: pydantic costs a noticeable part of a second.
"""

from medrl.core.config.blocks import Block, DataConfig, MethodConfig, ModelConfig, TrainConfig
from medrl.core.config.layers import (
    Layer,
    Resolved,
    flatten,
    known_keys,
    machine_keys,
    nest,
    resolve,
)
from medrl.core.config.method import config_model, presets, resolve_method
from medrl.core.config.strict_yaml import dump_yaml, load_yaml, parse_scalar, parse_set, parse_yaml

__all__ = [
    "Block",
    "DataConfig",
    "Layer",
    "MethodConfig",
    "ModelConfig",
    "Resolved",
    "TrainConfig",
    "config_model",
    "dump_yaml",
    "flatten",
    "known_keys",
    "load_yaml",
    "machine_keys",
    "nest",
    "parse_scalar",
    "parse_set",
    "parse_yaml",
    "presets",
    "resolve",
    "resolve_method",
]
