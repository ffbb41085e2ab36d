"""Trained networks in the formats of other programs, each checked with the loader of its own ecosystem.

A plugin names in `PluginInfo.networks` the function that rebuilds the networks of a checkpoint, as `Network`.
`export` writes one, reads it back and compares what it answers to a phantom; `verify` does so again, later
and elsewhere.
"""

from medrl.core.export.exporting import Exported, checkpoint_of, export, networks_of
from medrl.core.export.formats import FORMATS, Format, format_of
from medrl.core.export.network import Network, phantom
from medrl.core.export.verifying import Verdict, verify

__all__ = [
    "FORMATS",
    "Exported",
    "Format",
    "Network",
    "Verdict",
    "checkpoint_of",
    "export",
    "format_of",
    "networks_of",
    "phantom",
    "verify",
]
