"""What is asked of a run from outside while it trains: to save, or to save and end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

_AGAIN = 1.0  # seconds within which a second Ctrl-C is the launcher's echo of the first


class Asked(NamedTuple):
    """What all ranks have agreed to do after the present update."""

    save: bool = False
    end_by: int = 0  # number of the signal that ends the run; 0: it goes on


class Requests:
    """Signals, and a clock, that ask a run to save.

    SIGUSR1 asks for a state, SIGTERM and SIGINT (Ctrl-C) for a state and the end of the run, the clock for a state
    every `minutes`. All are answered after the update under way or, where a device runs ahead, the next, when the state
    is whole. A second Ctrl-C, more than a second after the first, interrupts at once.

    Args:
        minutes: Between two saves; None for no clock.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self._since = time.monotonic()
        self._save, self._end_by, self._interrupted = False, 0, 0.0

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Within this context signals are requests; Python hears them in its main thread only."""
        handlers = {signal.SIGUSR1: self._on_save, signal.SIGTERM: self._on_end, signal.SIGINT: self._on_interrupt}
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._since = time.monotonic()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def pending(self) -> Asked:
        """What this process has been asked for."""
        late = self._seconds is not None and time.monotonic() - self._since >= self._seconds
        return Asked(self._save or late, self._end_by)

    def saved(self) -> None:
        """A state has been saved: the clock starts again."""
        self._save, self._since = False, time.monotonic()

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        self._end_by = self._end_by or number

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted and now - self._interrupted > _AGAIN:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or now
        self._end_by = self._end_by or number


def end_by(number: int) -> None:
    """End the process as a shell expects after a signal: code 128 + number, Ctrl-C as `KeyboardInterrupt`."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
