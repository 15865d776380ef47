"""Networks of a run's evaluations, kept for the average of some of them at its end."""

from __future__ import annotations

import shutil
from collections.abc import Container
from pathlib import Path

from torch import Tensor, nn

from bnfinetune.training.saving.atomic import complete_folder, in_words, write_folder
from bnfinetune.training.saving.timm_folder import WEIGHTS, load_weights, save_tensors

_FOLDER = "snapshots"


class SnapshotStore:
    """Weights and statistics under RUN/snapshots, one folder for each update."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / _FOLDER

    def save(self, update: int, network: nn.Module) -> None:
        """Keep a network as it was evaluated after `update` updates.

        Raises:
            CheckpointError: It cannot be written.
        """
        target = self._path(update)
        with in_words(f"the snapshot {target}"):
            write_folder(target, lambda folder: save_tensors(folder / WEIGHTS, network.state_dict()))

    def holds(self, update: int) -> bool:
        """Whether a network of that update was kept."""
        return any(path.is_dir() for path in self.folder.glob(f"{self._path(update).name}*"))

    def load(self, update: int) -> dict[str, Tensor]:
        """What was kept after an update, on the CPU.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        return load_weights(complete_folder(self._path(update)))

    def keep_only(self, updates: Container[int]) -> None:
        """Remove the others."""
        for folder in self.folder.glob("update-*"):
            if int(folder.name.removeprefix("update-").removesuffix(".old")) not in updates:
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, update: int) -> Path:
        return self.folder / f"update-{update:08d}"
