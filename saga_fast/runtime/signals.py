"""SIGTERM and Ctrl-C let the current step finish; a second Ctrl-C does not wait for it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Stopped(Exception):
    """The run was asked to stop, and has saved a checkpoint; the message says at which step."""


class StopSignals:
    """While entered, SIGTERM and SIGINT set `requested` instead of ending the process. The second SIGINT raises
    KeyboardInterrupt; a second SIGTERM, as launchers send after a Ctrl-C that all processes got, changes nothing.

    Handlers belong to the main thread: entered in another, it changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}
        self._interrupted = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if not self.requested:
            # Not print(): the handler may run in the middle of another write to the same stream.
            os.write(2, b"\nThe current step is finished and saved, then the run stops; Ctrl-C again stops now.\n")
        self.requested = True
