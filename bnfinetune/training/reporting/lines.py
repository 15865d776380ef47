"""The lines of a run: on the terminal, beside its progress bar, and in its `run.log`."""

from __future__ import annotations

import io
import logging
import logging.handlers
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.recipe import Recipe
from bnfinetune.training.loop.progress import Progress, Status

LOG = "run.log"
_KEPT = 10_000  # lines said before there is a folder to write them to


class Lines:
    """Says lines, each as it is, with its time in a file as soon as there is one; silent but on rank 0.

    Args:
        speaks: Whether this is rank 0.
    """

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks
        self._logger = logging.Logger("bnfinetune.run", logging.INFO)  # of this run alone
        self._early = logging.handlers.MemoryHandler(_KEPT, flushLevel=logging.CRITICAL)
        self._logger.addHandler(self._early)

    def __call__(self, line: str) -> None:
        """Say a line, above the progress bar where there is one."""
        if self.speaks:
            tqdm.write(line)
            for part in line.splitlines():
                self.note(part)

    def note(self, line: str) -> None:
        """Write a line into the file alone."""
        if self.speaks:
            self._logger.info("%s", line)

    def write_to(self, path: Path) -> None:
        """Write into a file from now on, with what has been said before."""
        if not self.speaks:
            return
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
        self._early.setTarget(file)
        self._early.flush()
        self._logger.removeHandler(self._early)
        self._logger.addHandler(file)

    def close(self) -> None:
        """Close the file."""
        for handler in self._logger.handlers:
            handler.close()


@contextmanager
def shown_progress(
    recipe: Recipe, updates: int, start: int, say: Lines, track: Callable[[dict[str, float], int], None]
) -> Iterator[Callable[[Progress, Status], None]]:
    """Within this context a run's progress is shown: as a bar on a terminal, elsewhere as a line from time to time.

    Args:
        recipe: Its name, `run.log_every` and `run.track_every`.
        updates: Of the whole run.
        start: Updates already made.
        say: Says the lines; where there is a bar, they go into the file alone.
        track: Gives trackers values by name, and the update that they are of.

    Yields:
        What is to be called with the progress and the last update after each update.
    """
    terminal = say.speaks and sys.stderr.isatty()
    bar = tqdm(total=updates, initial=start, desc=recipe.name, unit="update", dynamic_ncols=True, disable=not terminal)
    begin = last = time.monotonic()

    def show(progress: Progress, status: Status) -> None:
        nonlocal last
        if progress.update % recipe.run.track_every == 0:
            known = {key: value for key, value in status._asdict().items() if value is not None}
            track({f"update/{key}": value for key, value in known.items()}, progress.update)
        if not bar.disable:
            bar.set_postfix_str(str(status), refresh=False)
            bar.update(progress.update - bar.n)
        now = time.monotonic()
        if now - last >= recipe.run.log_every:
            last = now
            left = (now - begin) / (progress.update - start) * (updates - progress.update)
            line = f"update {progress.update:>5}/{updates}  {status}  ETA {timedelta(seconds=round(left))}"
            say(line) if bar.disable else say.note(line)

    with bar:
        yield show


def told(reports: Mapping[str, PreciseBNReport], data: str) -> list[str]:
    """Statistics computed anew, a line for each network."""
    worst = {name: max(each.mean_shift_rms for each in report.layers.values()) for name, report in reports.items()}
    return [
        f"recalibrated {len(report.layers)} BN layers of the {name} on {report.samples} {data} images{report.weighed}; "
        f"means moved by up to {worst[name]:.2f} standard deviations (rms of a layer)"
        for name, report in reports.items()
    ]


def as_text(table: Table) -> str:
    """A table in plain characters."""
    out = io.StringIO()
    Console(file=out, width=120, force_jupyter=False, color_system=None).print(table)
    return out.getvalue().rstrip()
