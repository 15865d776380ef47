"""A checkpoint written for another program, and held against what it computed before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bnfinetune.errors import BnFinetuneError, CheckpointError, ExportError
from bnfinetune.export.agreement import Agreement, compare, real_images
from bnfinetune.export.formats import write_network
from bnfinetune.inference.predictor import Predictor, load
from bnfinetune.inference.preprocessing import PREPROCESSING, Preprocessing
from bnfinetune.inference.runners import TorchRunner
from bnfinetune.notes import note
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import dump_recipe, load_recipe, override_keys
from bnfinetune.training.measuring.measure import checkpoint_recipe, load_exported
from bnfinetune.training.network.backbone import input_config
from bnfinetune.training.network.norms import norm_config
from bnfinetune.training.saving.atomic import write_folder, write_json
from bnfinetune.training.saving.provenance import PROVENANCE
from bnfinetune.training.saving.timm_folder import fill_timm_folder

TIMM = "timm"
_CPU = torch.device("cpu")  # where both are compared: accelerators round products as they are set up


@dataclass(frozen=True)
class Written:
    """What an export has come to.

    Attributes:
        folder: Where the network lies now.
        form: The format.
        about: What was done to it, such as `fused_bn_layers`.
        agreement: With the network as it was.
    """

    folder: Path
    form: str
    about: dict[str, Any]
    agreement: Agreement

    def __str__(self) -> str:
        fused = self.about.get("fused_bn_layers")
        done = f"{fused} BN layers fused" if fused else self.about.get("architecture", "")
        return f"{self.form}{f', {done}' if done else ''}: {self.agreement}\nwritten to {self.folder}"


def export_checkpoint(
    checkpoint: str,
    out: str,
    form: str,
    overrides: Sequence[str] = (),
    *,
    normalisation_inside: bool = False,
    images: int = 256,
    tolerance: float = 1e-4,
    keep_differing: bool = False,
) -> Written:
    """Write an exported network in another format, and compare both on real images; `bnfinetune export` calls this.

    Args:
        checkpoint: A run folder, an exported folder such as RUN/best, or any folder that timm saved.
        out: The new folder, which must not exist.
        form: `onnx`, `torch_export`, `torchvision` or `timm`.
        overrides: `data.*` overrides of the recipe saved in the folder: on which images to compare, and of what size.
        normalisation_inside: The graph takes values from 0 to 1, and normalises them itself; of the first two formats.
        images: How many to compare on.
        tolerance: Largest difference of a score that is allowed, as a share of the largest score.
        keep_differing: Keep a network that differs by more, or gives another answer, and say so.

    Raises:
        CheckpointError: The folder holds no network, or `out` is taken or cannot be written.
        DataError: The images cannot be used.
        ExportError: The network cannot be written so, or computes something else there; nothing is kept.
    """
    target = free_folder(out)
    folder, recipe = checkpoint_recipe(checkpoint, overrides)
    model = load_exported(folder)
    plain = Preprocessing.of(model, recipe, folder)
    whole = "data.source" in override_keys(overrides)
    pictures = real_images(recipe, plain.levels, images, whole=whole)
    before = Predictor(TorchRunner(model, _CPU), plain)
    about: dict[str, Any] = {}
    found: list[Agreement] = []

    def fill(temporary: Path) -> None:
        if form == TIMM:
            own = load_recipe(checkpoint_recipe(checkpoint)[1], {"data.image_size": recipe.data.image_size})
            fill_as_timm(temporary, model, folder, own)
        else:
            about.update(write_network(form, model, replace(plain, in_graph=normalisation_inside), temporary))
        says = replace(plain, in_graph=normalisation_inside).to_dict()
        write_json(temporary / PREPROCESSING, {"format": form, **about, **says})
        found.append(compare(before, load(temporary, device=_CPU), pictures))
        write_json(temporary / "comparison.json", asdict(found[0]) | {"relative": found[0].relative})
        try:
            found[0].require(tolerance)
        except ExportError as error:
            if not keep_differing:
                raise
            note(str(error).replace("Nothing is kept; on_difference=note keeps it", "it is kept as was asked"))

    write_new_folder(target, fill)
    return Written(target, form, about, found[0])


def fill_as_timm(target: Path, model: Any, folder: Path, recipe: Recipe, **statistics: Any) -> None:
    """Write the network of `folder` as a run writes its best; `statistics` replace entries of where they come from."""
    preprocessing = Preprocessing.of(model, recipe, folder)
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # a folder that timm saved says nothing of them
        known = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    fill_timm_folder(
        target,
        model,
        preprocessing.labels,
        input_config(model, recipe.data.image_size),
        dump_recipe(recipe),
        known | statistics,
        norm_config(recipe.model),
        preprocessing.thresholds,
    )


def free_folder(out: str) -> Path:
    """`out`, if nothing lies there yet.

    Raises:
        CheckpointError: Something does.
    """
    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"out: {out} is not empty; choose a folder that does not exist yet")
    return target


def write_new_folder(target: Path, fill: Any) -> None:
    """`write_folder`, that leaves nothing behind if it fails.

    Raises:
        CheckpointError: The system refused to write.
    """
    try:
        write_folder(target, fill)
    except OSError as error:
        if isinstance(error, BnFinetuneError):
            raise
        raise CheckpointError(f"out: {target} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(target.with_name(f".{target.name}.tmp"), ignore_errors=True)
