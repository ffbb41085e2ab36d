"""The stop flag: what SIGTERM and SIGINT mean to a training run."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_REPEAT_S = 1.0


class StopFlag:
    """The first SIGTERM or SIGINT only sets a flag; the second ends the process at once.

    torchrun passes a signal on to processes that the terminal or the scheduler has signalled already; under
    torchrun the same signal within a second therefore counts once.
    """

    def __init__(self) -> None:
        self.number = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}
        self._echo = "TORCHELASTIC_RUN_ID" in os.environ

    def install(self) -> None:
        """Take over both signals; outside the main thread, where Python forbids it, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._at = number, now
        elif not (self._echo and number == self.number and now - self._at < _REPEAT_S):
            os._exit(128 + number)
