"""The loaders of a recipe for one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from bnfinetune.errors import RecipeError
from bnfinetune.recipe import Recipe
from bnfinetune.training.data.loaders import Loaders, build_loaders
from bnfinetune.training.data.splits import ImageSplits
from bnfinetune.training.data.transforms import build_transforms


def domains_of(recipe: Recipe) -> tuple[str, ...]:
    """Every domain that a recipe's `bn` sections declare, in order."""
    sections = recipe.bn if isinstance(recipe.bn, tuple) else (recipe.bn,)
    return tuple(dict.fromkeys(name for section in sections for name in section.domains))


def evaluated_domain(recipe: Recipe) -> str | None:
    """The domain whose statistics evaluation and the exported network use; None where there are no domains.

    Raises:
        RecipeError: `evaluate.domain` is none of `bn.domains`.
    """
    domains = domains_of(recipe)
    if recipe.evaluate.domain is None:
        return domains[-1] if domains else None
    if recipe.evaluate.domain not in domains:
        known = ", ".join(domains) or "none"
        raise RecipeError(f"evaluate.domain={recipe.evaluate.domain} is not among bn.domains ({known})")
    return recipe.evaluate.domain


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
        domains=domains_of(recipe),
    )
