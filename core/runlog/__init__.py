"""Run folders: config, manifest, lock, metrics as JSON lines, text log, TensorBoard sink. Light."""

from medrl.core.runlog.folder import STATUSES, RunFolder, new_run_name
from medrl.core.runlog.lock import RunLock
from medrl.core.runlog.sinks import TensorBoardSink

__all__ = ["STATUSES", "RunFolder", "RunLock", "TensorBoardSink", "new_run_name"]
