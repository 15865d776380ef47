"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = {
    "import": "import",
    "set_up": "set-up",
    "first_batch": "first batch",
    "data_wait": "wait for data",
    "step": "updates",
    "statistics": "statistics",
    "evaluation": "evaluation",
    "saving": "saving",
    "page": "page",
    "other": "the rest",
}
"""The parts of a run by the names that they have in files, with those that people read."""


class Stopwatch:
    """Seconds on the clock of this process, by part of a run: every moment belongs to one part.

    On an accelerator a part ends when its work is handed over; whoever waits for a result is charged for it.

    Args:
        began: when the process began, as `time.time` counts, where the run is all that it does: the time since then
            went into imports.
    """

    def __init__(self, began: float | None = None) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        if began is not None:
            self._seconds["import"] = max(time.time() - began, 0.0)
        self._running, self._since = ["other"], time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block belongs to a part, except for what belongs to another one within it.

        Args:
            name: one of `PARTS`.
        """
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def read(self) -> dict[str, float]:
        """Seconds by part so far, in milliseconds' precision."""
        self._charge()
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}

    def __str__(self) -> str:
        """The whole and the parts that count, the longest first."""
        seconds = self.read()
        total = sum(seconds.values())
        longest = sorted((name for name in PARTS if seconds[name] >= 0.01 * total), key=lambda name: -seconds[name])
        return f"{total:,.1f} s: {', '.join(f'{PARTS[name]} {seconds[name]:,.1f}' for name in longest)}"

    def _charge(self) -> None:
        """Give the time since the last change to the part that was running."""
        now = time.perf_counter()
        self._seconds[self._running[-1]] += now - self._since
        self._since = now
