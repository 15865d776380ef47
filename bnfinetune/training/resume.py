"""Opening the folder of a run: a new one, or one that goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from bnfinetune.errors import CheckpointError
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import diff_recipes, load_recipe
from bnfinetune.training.checkpoint import RECIPE, StateStore
from bnfinetune.training.folder import choose_folder, write_text
from bnfinetune.training.start import on_main

# Where a run lives and whether it goes on do not change what it computes.
_FREE_KEYS = {"run.dir", "run.check", "run.report", "run.tracking", "train.resume", "data.workers", "checkpoint.keep"}


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and the state to go on from, if any."""

    path: Path
    state: Path | None = None
    warnings: tuple[str, ...] = ()


def choose_run(recipe: Recipe, accelerator: Accelerator) -> RunFolder:
    """Decide on the folder, alike on all ranks, and write nothing yet.

    Raises:
        CheckpointError: The folder is taken or cannot be written, there is nothing to resume, or the run in it
            followed another recipe.
    """
    return on_main(accelerator, lambda: _choose(recipe))


def _choose(recipe: Recipe) -> RunFolder:
    resume = recipe.train.resume
    if resume is None:
        return RunFolder(choose_folder(recipe.run.dir, recipe.name))
    if resume == "auto" and recipe.run.dir is None:
        raise CheckpointError("train.resume=auto needs run.dir, the folder to continue; or set train.resume=FOLDER")
    folder = Path(recipe.run.dir if resume == "auto" else resume)  # type: ignore[arg-type]
    state, damaged = StateStore(folder, keep=1).newest()
    if state is None and resume == "auto" and not damaged:
        return RunFolder(choose_folder(recipe.run.dir, recipe.name))
    if state is None:
        raise CheckpointError(
            f"train.resume: {folder} holds no undamaged state under checkpoints/; name a run folder that does"
        )
    _same_recipe(state, recipe)
    return RunFolder(folder, state, tuple(f"warning: {line}; going on from {state.name}" for line in damaged))


def _same_recipe(state: Path, recipe: Recipe) -> None:
    saved = load_recipe(str(state / RECIPE))
    differing = {key: pair for key, pair in diff_recipes(saved, recipe).items() if key not in _FREE_KEYS}
    if differing:
        shown = ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in list(differing.items())[:3])
        raise CheckpointError(
            f"train.resume: the run in {state.parent.parent} follows another recipe ({shown}); "
            "use the same values, or start anew in another run.dir"
        )


def create_run(folder: RunFolder, recipe_text: str, environment: dict[str, Any]) -> None:
    """Make a new run's folder and write what it is; a resumed one stays as it is."""
    if folder.state is not None:
        return
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_text(folder.path / RECIPE, recipe_text)
        write_text(folder.path / "environment.json", json.dumps(environment, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"run.dir: {folder.path} cannot be written ({error.strerror}); choose another run.dir"
        ) from error
