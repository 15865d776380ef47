"""Opening the folder of a run: a new one, or one that goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from bnfinetune.errors import CheckpointError, RecipeError
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import diff_recipes, load_recipe
from bnfinetune.recipe_keys import find_key, nearest_key
from bnfinetune.training.launch import GlobalBatch, on_main
from bnfinetune.training.saving.lock import RunLock
from bnfinetune.training.saving.run_folder import SUMMARY, RunFolder, choose_folder
from bnfinetune.training.saving.states import CHECKPOINTS, StateStore, describe_state
from bnfinetune.training.saving.timm_folder import RECIPE

# Where a run lives, what it shows and keeps, and whether it goes on do not change what it computes.
_FREE_KEYS = {
    *(
        "run.dir",
        "run.check",
        "run.report",
        "run.tracking",
        "run.track_every",
        "run.log_every",
        "data.workers",
        "data.decoded_cache",
        "train.cache_dir",
        "train.cache_memory",
    ),
    *("train.resume", "train.resume_allow", "train.max_skipped", "train.auto_batch", "train.timeout_minutes"),
    *("checkpoint.keep", "checkpoint.every_steps", "checkpoint.every_minutes"),
}
_CHOSEN_KEYS = ("optim.lr", "model.channels_last")  # which a run settles for itself where they say `auto`
_BATCH_KEYS = {"train.batch_size", "train.grad_accum"}  # with the number of ranks they make the global batch


def with_saved_choices(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """A recipe that goes on, with what the saved run had settled in the place of `auto`; alike on all ranks."""
    return on_main(accelerator, lambda: _with_saved_choices(recipe))


def _with_saved_choices(recipe: Recipe) -> Recipe:
    resume = recipe.train.resume
    saved = Path((recipe.run.dir if resume == "auto" else resume) or "") / RECIPE
    if resume is None or not saved.is_file():
        return recipe
    differing = diff_recipes(recipe, load_recipe(str(saved)))
    chosen = {key: differing[key][1] for key in _CHOSEN_KEYS if key in differing and differing[key][0] == "auto"}
    return load_recipe(recipe, chosen) if chosen else recipe


def choose_run(recipe: Recipe, accelerator: Accelerator, lock: RunLock) -> RunFolder:
    """Decide on the folder, alike on all ranks, and write nothing into it but the lock of a run that goes on.

    Raises:
        CheckpointError: The folder is taken or cannot be written, there is nothing to resume, or the run in it
            followed another recipe.
    """
    here = recipe.train.resume == "auto" and (Path(recipe.run.dir or "") / RECIPE).is_file()
    holders = [rank for rank, holds in enumerate(gather_object([here])) if holds]
    return on_main(accelerator, lambda: _choose(recipe, accelerator.num_processes, lock, holders))


def _choose(recipe: Recipe, ranks: int, lock: RunLock, holders: list[int]) -> RunFolder:
    _check_allowed(recipe)
    resume = recipe.train.resume
    if resume is None:
        return RunFolder(choose_folder(recipe.run.dir, recipe.name))
    if resume == "auto" and recipe.run.dir is None:
        raise CheckpointError("train.resume=auto needs run.dir, the folder to continue; or set train.resume=FOLDER")
    folder = Path(recipe.run.dir if resume == "auto" else resume)  # type: ignore[arg-type]
    if (folder / RECIPE).is_file():
        lock.take(folder)
    state, damaged = StateStore(folder, keep=1).newest()
    if state is None and not damaged:
        if _began(folder):
            _same_recipe(folder, recipe, same_batch=False)
            return RunFolder(folder, notes=(f"no state was saved in {folder} yet: the run begins anew",), again=True)
        if resume == "auto":
            if holders and holders[0] != 0:
                raise CheckpointError(
                    f"train.resume=auto: process {holders[0]} has {folder} on its machine, and process 0 has not: let "
                    "that machine be the first one (torchrun --node-rank 0), or choose another run.dir to start anew"
                )
            return RunFolder(choose_folder(recipe.run.dir, recipe.name))
    if state is None:
        raise CheckpointError(
            f"train.resume: {folder} holds no undamaged state under checkpoints/; name a run folder that does"
        )
    return _continued(folder, state, damaged, recipe, ranks)


def _began(folder: Path) -> bool:
    """Whether a run was killed here before it saved its first state."""
    return (folder / RECIPE).is_file() and not (folder / SUMMARY).exists()


def _continued(folder: Path, state: Path, damaged: list[str], recipe: Recipe, ranks: int) -> RunFolder:
    about = describe_state(state)
    then = GlobalBatch(about["ranks"], about["batch_size"], about["grad_accum"])
    now = GlobalBatch.of(recipe, ranks)
    if ranks != about["ranks"] and then.images != now.images:
        raise CheckpointError(
            f"train.resume: {state} was saved by {about['ranks']} processes with {then.images} images per update, and "
            f"this is {ranks} with {now.images}; keep processes x train.batch_size x train.grad_accum at {then.images}"
        )
    differing = _same_recipe(state, recipe, same_batch=then.images == now.images)
    notes = [f"warning: {line}; going on from {state.name}" for line in damaged]
    if differing:
        notes.append(f"train.resume_allow: {', '.join(differing)} differ from those of the saved run")
    if then != now and then.images == now.images:
        old, new = (" x ".join(map(str, numbers)) for numbers in (then, now))
        notes.append(
            f"going on with {new} instead of {old} (processes x train.batch_size x train.grad_accum), the same "
            f"{now.images} images per update: batch statistics, mixup and dropout see other batches from here on"
        )
    return RunFolder(folder, state, tuple(notes), altered=bool(differing) or then != now)


def _check_allowed(recipe: Recipe) -> None:
    for key in recipe.train.resume_allow:
        if find_key(key) is None:
            near = nearest_key(key)
            raise RecipeError(f"train.resume_allow: {key}: no such key{f'; did you mean {near}?' if near else ''}")


def _same_recipe(saved: Path, recipe: Recipe, *, same_batch: bool) -> list[str]:
    """The keys that differ and may; the keys of a batch may, unnamed, where the global batch is the same.

    Raises:
        CheckpointError: Others differ.
    """
    differing = {
        key: pair
        for key, pair in diff_recipes(load_recipe(str(saved / RECIPE)), recipe).items()
        if key not in _FREE_KEYS and not (key in _BATCH_KEYS and same_batch)
    }
    allowed = [key for key in differing if any(_covers(name, key) for name in recipe.train.resume_allow)]
    refused = {key: pair for key, pair in differing.items() if key not in allowed}
    if refused:
        shown = ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in list(refused.items())[:3])
        raise CheckpointError(
            f"train.resume: the run in {saved.parent.parent if saved.parent.name == CHECKPOINTS else saved} follows "
            f"another recipe ({shown}); use the same values, name the keys in train.resume_allow, "
            "or start anew in another run.dir"
        )
    return allowed


def _covers(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}.")
