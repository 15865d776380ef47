"""The folder of a run: what lies where in it, and that none is ever overwritten silently."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfinetune.errors import CheckpointError
from bnfinetune.training.saving.atomic import write_text
from bnfinetune.training.saving.lock import RunLock
from bnfinetune.training.saving.timm_folder import RECIPE

METRICS = "metrics.jsonl"
UNREADABLE = "unreadable.txt"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and the state to go on from, if any.

    Attributes:
        path: The folder.
        state: The state; None for a run that begins.
        notes: Lines to say.
        altered: The recipe or the number of ranks differ from those of the state, as was allowed.
        again: A run was killed here before its first state, and begins anew.
    """

    path: Path
    state: Path | None = None
    notes: tuple[str, ...] = ()
    altered: bool = False
    again: bool = False

    @property
    def best(self) -> Path:
        """Where the best network lies."""
        return self.path / "best"

    def create(self, recipe_text: str, environment: dict[str, Any], lock: RunLock) -> None:
        """Make a new run's folder, lock it, and write what the run is; a resumed one stays as it is.

        Raises:
            CheckpointError: It cannot be written, or another run has taken it meanwhile.
        """
        if self.state is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.take(self.path)
            if not self.again:
                choose_folder(str(self.path), "")  # another run may have come first
            (self.path / METRICS).unlink(missing_ok=True)
            write_text(self.path / RECIPE, recipe_text)  # first: a folder with a recipe is known for a run
            write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"run.dir: {self.path} cannot be written ({error.strerror}); choose another run.dir"
            ) from error


def choose_folder(directory: str | None, name: str) -> Path:
    """The folder of a new run: `directory` if it is new or empty, else the next free `runs/NAME[-N]`.

    Raises:
        CheckpointError: `directory` already holds something, or its parent cannot be written.
    """
    if directory is None:
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        number = 1
        while (folder := Path("runs") / (stem if number == 1 else f"{stem}-{number}")).exists():
            number += 1
    else:
        folder = Path(directory)
        if folder.is_file() or (folder.is_dir() and not is_blank(folder)):
            raise CheckpointError(
                f"run.dir: {folder} is not empty; choose another folder, or continue that run with train.resume=auto"
            )
    _check_writable(folder)
    return folder


def is_blank(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run killed in its first moments leaves: hidden files."""
    return all(path.name.startswith(".") and path.is_file() for path in folder.iterdir())


def _check_writable(folder: Path) -> None:
    """Fail before the run rather than after it, and without creating anything."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"run.dir: {existing} is not a writable folder; choose another run.dir")
