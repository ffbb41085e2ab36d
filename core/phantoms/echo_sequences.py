"""Sequences of a beating heart in an apical view; see `medrl.core.phantoms.echo`."""

from __future__ import annotations

from medrl.core.phantoms.echo.sequences import SequencePhantom, make_sequence, write_echo_sequences

__all__ = ["SequencePhantom", "make_sequence", "write_echo_sequences"]
