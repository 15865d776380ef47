"""A network sent to the hub, as a repository that timm and transformers load.

timm's own `push_to_hf_hub` makes these calls too (`create_repo`, `file_exists`, `upload_folder`, and its way of writing
`config.json`). It would pickle the weights beside safetensors, leave out the recipe and where the statistics come from,
and its card has no place for measurements; so the folder is written here, and its parts are called.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from bnfinetune.errors import BnFinetuneError, ExportError, RecipeError
from bnfinetune.export.checkpoint import fill_as_timm, free_folder, write_new_folder
from bnfinetune.export.hub_card import CardFacts, model_card, read_facts
from bnfinetune.inference.preprocessing import Preprocessing
from bnfinetune.notes import note
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import load_recipe
from bnfinetune.source_paths import hub_answers
from bnfinetune.training.measuring.measure import checkpoint_recipe, load_exported
from bnfinetune.training.saving.atomic import write_text

_CARD = "README.md"


def push_checkpoint(
    checkpoint: str,
    repo: str,
    *,
    private: bool = False,
    licence: str | None = None,
    message: str = "Add model",
    dry_run: str | None = None,
) -> str:
    """Send a network with a card to the hub, or write what would be sent; `bnfinetune push` calls this.

    Args:
        checkpoint: A run folder, whose numbers the card tells, an exported folder, or any folder that timm saved.
        repo: `USER/NAME`; made if it does not exist. A card that it has already is left as it is.
        private: Make a new repository one that only its owner sees.
        licence: As the hub names licences; by default that of the weights before, if it is known.
        message: Of the commit.
        dry_run: A new folder to write instead of sending anything.

    Returns:
        Where the network is now: the address of the commit, or the folder.

    Raises:
        CheckpointError: The folder holds no network, or `dry_run` is taken.
        ExportError: The hub cannot be reached or refuses, or timm could not build the network.
        RecipeError: `repo` is no name of a repository.
    """
    _check_name(repo)
    target = None if dry_run is None else free_folder(dry_run)
    fill = _repository(checkpoint, repo, licence)
    if target is not None:
        write_new_folder(target, fill)
        return str(target)
    if not hub_answers():
        raise ExportError(f"push: the hub ({constants.ENDPOINT}) cannot be reached; dry_run=FOLDER writes the folder")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_new_folder(folder, fill)
        try:
            return _send(folder, repo, private=private, message=message)
        except Exception as error:  # the hub's client raises errors of several libraries
            raise ExportError(_refusal(repo, error)) from error


def published_recipe(recipe: Recipe) -> Recipe:
    """A recipe without the folders of the machine that trained: of a path the last part is left."""
    source, kind = recipe.model.name, "local-dir:"
    local = {
        "model.name": kind + _last(source[len(kind) :]) if source.startswith(kind) else source,
        "model.checkpoint": recipe.model.checkpoint and _last(recipe.model.checkpoint),
        "data.source": _last(recipe.data.source) if _is_local(recipe.data.source) else recipe.data.source,
        "train.cache_dir": None,
        "train.resume": None,
        "run.dir": None,
    }
    return load_recipe(recipe, local)


def _repository(checkpoint: str, repo: str, licence: str | None) -> Callable[[Path], None]:
    """What fills a folder with all that the repository is to hold."""
    folder, recipe = checkpoint_recipe(checkpoint)
    model: Any = load_exported(folder)
    if recipe.model.group_norm is not None:
        raise ExportError(f"push: {folder} has GroupNorm in the place of BN, which timm cannot build; use bnf.load")
    shown = published_recipe(recipe)
    known = read_facts(folder)
    facts = CardFacts(
        name=repo,
        architecture=model.pretrained_cfg["architecture"],
        recipe=shown,
        preprocessing=Preprocessing.of(model, recipe, folder),
        licence=licence or model.pretrained_cfg.get("license") or "unknown",
        **known,
    )

    def fill(target: Path) -> None:
        own = {"source": shown.data.source} if "source" in known["statistics"] else {}
        fill_as_timm(target, model, folder, shown, **own)
        write_text(target / _CARD, model_card(facts))

    return fill


def _send(folder: Path, repo: str, *, private: bool, message: str) -> str:
    api = HfApi(library_name="timm", library_version=timm.__version__)
    name = api.create_repo(repo, private=private, exist_ok=True).repo_id
    kept = [_CARD] if api.file_exists(name, _CARD) else []
    if kept:
        note(f"push: {name} has a card already, which stays as it is; delete its {_CARD} for one of these numbers")
    sent = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=kept)
    return str(sent.commit_url)


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"repo: found {repo!r}; {str(error).splitlines()[0]}") from error
    if repo.count("/") != 1:
        raise RecipeError(f"repo: found {repo!r}; write repo=USER/NAME")


def _refusal(repo: str, error: Exception) -> str:
    if isinstance(error, BnFinetuneError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    status = getattr(getattr(error, "response", None), "status_code", None)
    remedy = "; log in by `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
    return f"push: {constants.ENDPOINT} did not take {repo} ({lines[0].rstrip('.')}){remedy}"


def _is_local(source: str) -> bool:
    return os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") > 1 or os.path.exists(source)


def _last(path: str) -> str:
    return os.path.basename(path.rstrip("/\\")) or path
