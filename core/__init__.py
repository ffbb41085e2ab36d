"""The machine under every method: data, runtime, checkpoints, metrics, reinforcement learning, plugin host.

What a plugin's `plugin.py` and `commands.py` need is offered here; importing it loads nothing heavy.
"""

if not __name__.startswith("medrl."):
    raise ImportError(
        "import this package as 'medrl.core': run 'pip install -e .' "
        "and do not put the repository root on sys.path"
    )

from medrl.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    MedrlError,
    PluginError,
    RuntimeFault,
)
from medrl.core.hookspecs import hookimpl
from medrl.core.jobs import config_option
from medrl.core.types import PLUGIN_API, PluginInfo

__all__ = [
    "PLUGIN_API",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Interrupted",
    "MedrlError",
    "PluginError",
    "PluginInfo",
    "RuntimeFault",
    "config_option",
    "hookimpl",
]
