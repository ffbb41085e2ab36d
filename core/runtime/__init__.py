"""The machine behind every training loop: device, ranks, precision, stepping, signals, checkpoints, log."""

from medrl.core.runtime.loader import ResumableLoader
from medrl.core.runtime.machine import Runtime
from medrl.core.runtime.ranks import Ranks, detect_ranks
from medrl.core.runtime.stepping import StepInfo

__all__ = ["Ranks", "ResumableLoader", "Runtime", "StepInfo", "detect_ranks"]
