"""What came of a comparison: means, paired differences, and what they cost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from bnfinetune.bn.saved_report import SavedReport
from bnfinetune.comparison.paired import Difference, Outcome, expected_reach, paired_difference
from bnfinetune.errors import CheckpointError
from bnfinetune.training.loop.progress import LOWER_IS_BETTER
from bnfinetune.training.measuring.outcomes import SplitOutcomes, read_outcomes
from bnfinetune.training.reporting.lines import as_text
from bnfinetune.training.saving.run_folder import METRICS, SUMMARY

_MANY = 10_000  # seeds, as good as all there are


@dataclass(frozen=True)
class Finished:
    """One finished run.

    Attributes:
        folder: Where it lies.
        numbers: Its summary.
        outcomes: The outcome of every image, by split.
    """

    folder: Path
    numbers: dict[str, Any]
    outcomes: dict[str, SplitOutcomes]

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of their numbers."""
        return tuple(self.numbers["per_class"])

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was measured over the run, from before its first update on."""
        lines = (self.folder / METRICS).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        if found and found[0]["update"] == 0:  # a head that was fitted was measured once more
            return found
        return [{"update": 0} | self.numbers["before"]["validation"], *found]

    @classmethod
    def of(cls, folder: Path) -> Finished:
        """What a run's folder tells.

        Raises:
            CheckpointError: The run is not over.
        """
        try:
            numbers = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is not the folder of a finished run: {SUMMARY} cannot be read") from error
        return cls(folder, numbers, read_outcomes(folder))


@dataclass
class Compared:
    """One cell with its runs.

    Attributes:
        name: What sets it apart.
        words: How it is written on a command line.
        runs: Finished runs by seed.
        error: What went wrong in a run of it.
        left_after: Seeds after which it was surely behind the leader, and made no more runs.
    """

    name: str
    words: tuple[str, ...]
    runs: dict[int, Finished] = field(default_factory=dict)
    error: str | None = None
    left_after: int | None = None

    def scores(self, split: str, metric: str) -> list[float]:
        """A metric by seed."""
        return [run.numbers["after"][split][metric] for _, run in sorted(self.runs.items())]


@dataclass(frozen=True)
class Comparison(SavedReport):
    """The outcome of `compare`; print it, or `save` it as JSON.

    Attributes:
        cells: All of them, the best on validation first, those without a finished run last.
        metric: The validation metric that chooses.
    """

    cells: tuple[Compared, ...]
    metric: str

    @classmethod
    def of(cls, cells: Sequence[Compared], metric: str) -> Comparison:
        """Cells in the order of their means."""
        sign = 1 if metric in LOWER_IS_BETTER else -1

        def place(cell: Compared) -> tuple[bool, bool, float]:
            left = cell.left_after is not None
            return not cell.runs, left, sign * mean(cell.scores("validation", metric)) if cell.runs else 0.0

        return cls(tuple(sorted(cells, key=place)), metric)

    @property
    def winner(self) -> Compared:
        """The cell that is best on validation.

        Raises:
            CheckpointError: No run is over.
        """
        if not self.cells or not self.cells[0].runs:
            raise CheckpointError("no run of this comparison is over: " + (self.cells[0].error or "none was made"))
        return self.cells[0]

    @property
    def command(self) -> str:
        """The command line of the winner."""
        return f"bnfinetune {shlex.join(self.winner.words)}"

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """How far each other cell is from the winner, in the share of validation images that are right."""
        best = self.winner
        return {
            cell.name: difference_of(cell.runs, best.runs)
            for cell in self.cells
            if cell is not best and cell.runs.keys() & best.runs.keys()
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        cells = [self._cell(cell) for cell in self.cells]
        return {"metric": self.metric, "winner": self.winner.name, "command": self.command, "cells": cells}

    def _cell(self, cell: Compared) -> dict[str, Any]:
        splits = {split for run in cell.runs.values() for split in run.numbers["after"]}
        return {
            "name": cell.name,
            "words": list(cell.words),
            "seeds": sorted(cell.runs),
            **{split: cell.scores(split, self.metric) for split in sorted(splits)},
            "behind_winner": None if cell.name not in self.differences else self.differences[cell.name]._asdict(),
            "seconds": [run.numbers["seconds"] for run in cell.runs.values()],
            "updates": [run.numbers["updates"] for run in cell.runs.values()],
            "peak_memory_bytes": [run.numbers["peak_memory_bytes"] for run in cell.runs.values()],
            "left_after": cell.left_after,
            "error": cell.error,
        }

    def table(self) -> Table:
        """One row per cell."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("cell", overflow="fold")
        for title in (self.metric, "seeds", "to the best [95 %]", "test", "seconds"):
            table.add_column(title, justify="right")
        for cell in self.cells:
            table.add_row(Text(cell.name), *map(Text, self.row(cell)))
        return table

    def row(self, cell: Compared) -> list[str]:
        """What the table says of a cell, behind its name."""
        if not cell.runs:
            return ["failed", "0", "", "", ""]
        tested = cell.left_after is None and all("test" in run.numbers["after"] for run in cell.runs.values())
        found = self.differences.get(cell.name)
        return [
            _spread(cell.scores("validation", self.metric)),
            str(len(cell.runs)),
            "" if found is None else f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]",
            _spread(cell.scores("test", self.metric)) if tested else "",
            f"{mean(run.numbers['seconds'] for run in cell.runs.values()):.0f}",
        ]

    def __str__(self) -> str:
        left = [f"{cell.name} left after {cell.left_after} seeds" for cell in self.cells if cell.left_after]
        failed = [f"{cell.name} failed: {cell.error}" for cell in self.cells if cell.error]
        return "\n".join([as_text(self.table()), *left, *failed, f"the best on validation: {self.command}"])


def difference_of(first: Mapping[int, Finished], second: Mapping[int, Finished], *, level: float = 0.95) -> Difference:
    """The paired difference of two cells over the seeds that both have, with its interval of a level.

    Raises:
        CheckpointError: They were measured on other images.
    """
    mine, theirs, alike = _paired_outcomes(first, second)
    return paired_difference(mine, theirs, same_images=alike, level=level)


def outlook(found: Comparison, cell: Compared) -> str | None:
    """What more seeds would tell of a cell's difference to the best; None where that is known, or of one seed."""
    now = found.differences[cell.name]
    if now.is_behind or now.seeds < 2:
        return None
    mine, theirs, alike = _paired_outcomes(cell.runs, found.winner.runs)
    more = 2 * now.seeds
    reach, last = (expected_reach(mine, theirs, same_images=alike, seeds=seeds) for seeds in (more, _MANY))
    told = f"{cell.name}: {100 * now.mean:+.1f} points; {more} seeds would know it to about {100 * reach:.1f}"
    if abs(now.mean) < last:
        return f"{told}, and no number of seeds tells it from 0: these images are too few, or they are alike"
    return told


def _paired_outcomes(
    first: Mapping[int, Finished], second: Mapping[int, Finished]
) -> tuple[list[Outcome], list[Outcome], bool]:
    """Right or not, under the seeds that both cells have, and whether all seeds were measured on the same images.

    Raises:
        CheckpointError: The cells were measured on different images.
    """
    seeds = sorted(first.keys() & second.keys())
    pairs = [(first[seed].outcomes["validation"], second[seed].outcomes["validation"]) for seed in seeds]
    if any(not np.array_equal(one.row, other.row) for one, other in pairs):
        raise CheckpointError("runs that are compared must be validated on the same images under the same seed")
    return [one.right for one, _ in pairs], [two.right for _, two in pairs], _same_rows([one for one, _ in pairs])


def outcomes_of(cell: Compared) -> list[Outcome]:
    """Right or not, of validation, by seed."""
    return [run.outcomes["validation"].right for _, run in sorted(cell.runs.items())]


def on_same_images(cells: Sequence[Compared]) -> bool:
    """Whether all runs were validated on the same images, whatever their seed."""
    return _same_rows([run.outcomes["validation"] for cell in cells for run in cell.runs.values()])


def _same_rows(outcomes: Sequence[SplitOutcomes]) -> bool:
    return all(np.array_equal(each.row, outcomes[0].row) for each in outcomes)


def _spread(values: Sequence[float]) -> str:
    """Mean and range, in percent where they are shares."""
    shown = [100 * value for value in values] if all(0 <= value <= 1 for value in values) else list(values)
    if len(values) == 1:
        return f"{shown[0]:.1f}"
    return f"{mean(shown):.1f} ({min(shown):.1f}-{max(shown):.1f})"
