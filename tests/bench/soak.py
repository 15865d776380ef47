"""Memory and open files of a long run: thousands of updates with re-estimation, evaluations and saved states.

    python -m tests.bench soak [--steps 4000] [--workers 0]

Fine-tunes the embedded network on the embedded digits as recipe `full` does, with an averaged copy, and reads the
resident memory and the open files of the process and of its loader processes at each evaluation.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bnfinetune.training.pauses import Pauses
from bnfinetune.training.run import finetune


class Reading(NamedTuple):
    """What the system holds for the run after an update: MiB of resident memory, open files, seconds since begin."""

    update: int
    memory: float
    files: int
    seconds: float


def read(update: int, begin: float) -> Reading:
    """Read this process and its children."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    memory = files = 0
    for process in (own, *map(int, children)):
        memory += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        files += len(os.listdir(f"/proc/{process}/fd"))
    return Reading(update, memory / 2**20, files, time.monotonic() - begin)


def soak(steps: int, workers: int, readings: int = 20) -> list[Reading]:
    """Run `steps` updates and read at every evaluation, of which there are `readings`."""
    found: list[Reading] = []
    pause, begin = Pauses.__call__, time.monotonic()

    def measured_pause(self: Pauses, *, evaluate: bool) -> None:
        pause(self, evaluate=evaluate)
        if evaluate:
            found.append(read(self.trainer.progress.update, begin))

    Pauses.__call__ = measured_pause  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "run.dir": f"{folder}/run",
                "train.steps": steps,
                "train.ema": 0.99,
                "data.workers": workers,
                "evaluate.every_steps": max(steps // readings, 1),
                "checkpoint.every_steps": max(steps // (4 * readings), 1),
                "recalibrate.at": ["eval"],
                "recalibrate.samples": 256,
            }
            finetune("full", **options)
    finally:
        Pauses.__call__ = pause  # type: ignore[method-assign]
    return found


def main(arguments: Sequence[str]) -> None:
    """Print the readings, and between what bounds memory and files are in the first and in the second half."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench soak")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args(arguments)
    found = soak(options.steps, options.workers)
    print("updates   resident MiB   open files   seconds")
    for reading in found[:: max(len(found) // 10, 1)]:
        print(f"{reading.update:7}   {reading.memory:12.1f}   {reading.files:10}   {reading.seconds:7.1f}")
    middle = (len(found) + 1) // 2
    for name, half in (("first half", found[:middle]), ("second half", found[middle:] or found)):
        memory, files = [r.memory for r in half], [r.files for r in half]
        print(f"{name}: {min(memory):.1f} to {max(memory):.1f} MiB, {min(files)} to {max(files)} open files")
