"""The images of a recipe, and its loaders for one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from bnfinetune.errors import DataError
from bnfinetune.recipe import Recipe
from bnfinetune.training.data.loaders import Loaders, build_loaders
from bnfinetune.training.data.splits import ImageSplits, load_splits
from bnfinetune.training.data.transforms import build_transforms
from bnfinetune.training.launch import on_all


def recipe_splits(recipe: Recipe, accelerator: Accelerator, **options: Any) -> ImageSplits:
    """The images of a recipe, which every machine reads from its own disk.

    Args:
        recipe: The recipe.
        accelerator: The ranks.
        **options: `network` and `whole` of `load_splits`.

    Raises:
        DataError: They cannot be used, or are not the same on every machine.
    """
    splits = on_all(accelerator, lambda: load_splits(recipe.data, recipe.run.seed, **options))
    found = gather_object([splits.fingerprint()]) if accelerator.num_processes > 1 else []
    other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        raise DataError(
            f"data.source: process {other} finds other images in {recipe.data.source} than process 0: bring the same "
            "files to every machine, or name a folder that all of them share"
        )
    return splits


def recipe_loaders(
    recipe: Recipe, splits: ImageSplits, data_config: Mapping[str, Any], accelerator: Accelerator
) -> Loaders:
    """Loaders that shard by Accelerate's ranks themselves; `data_config` is timm's, from `input_config`."""
    return build_loaders(
        splits,
        build_transforms(recipe.data, data_config),
        recipe.data,
        batch_size=recipe.train.batch_size,
        eval_batch_size=recipe.evaluate.batch_size,
        seed=recipe.run.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        domains=recipe.domains,
    )
