"""The loaders of a recipe for one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from bnfinetune.recipe import Recipe
from bnfinetune.training.data.loaders import Loaders, build_loaders
from bnfinetune.training.data.splits import ImageSplits
from bnfinetune.training.data.transforms import build_transforms


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
