"""Signals that ask a process to end: noted, so that it can finish what it is doing first."""

import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the training; a checkpoint was saved first if the run has a place."""

    def __init__(self, number: int, step: int, out: Path | None):
        saved = f"; the checkpoint is in {out}" if out else ""
        super().__init__(f"{signal.Signals(number).name} after step {step}{saved}")
        self.number = number


class SignalNote:
    """While entered, remembers a SIGINT or SIGTERM in `number`; a second one acts at once.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalNote":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        signal.signal(number, self._previous[number])
