"""Signals that ask a process to end: noted, so that it can finish what it is doing first."""

import signal
import threading
from types import TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended long work; what had been done was saved first if it has a place.

    Args:
        number: of the signal.
        after: what had been done.
        saved: where it is saved, "" for nowhere.
    """

    def __init__(self, number: int, after: str, saved: str = ""):
        saved = f"; {saved}" if saved else ""
        super().__init__(f"{signal.Signals(number).name} after {after}{saved}")
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
