"""What a recipe's `bn` sections do to a network before it trains."""

from __future__ import annotations

import torch
from torch import nn

from bnfinetune.bn.absorb import absorb_bn
from bnfinetune.bn.policy.apply import apply_policy
from bnfinetune.bn.policy.spec import BNPolicy, auto_momentum
from bnfinetune.errors import PolicyError, RecipeError
from bnfinetune.recipe import Recipe
from bnfinetune.training.network.backbone import input_config

MOMENTS = ("freeze_after", "unfreeze_after")
"""Keys of a section that ask for a change during the run."""

_NO_POLICY = {*MOMENTS, "fold", "parameterisation"}  # what other code reads


def apply_recipe_policies(model: nn.Module, recipe: Recipe, batches_per_epoch: int | None) -> None:
    """Apply the policies of a recipe's `bn` section; one that sets no switch leaves the network as it is."""
    policies = []
    for section in recipe.bn_sections:
        settings = section.model_dump(exclude_defaults=True, exclude=_NO_POLICY)
        if settings.get("momentum") == "auto":
            if batches_per_epoch is None:
                raise RecipeError("bn.momentum=auto counts batches per epoch, which a stream has not; give a number")
            settings["momentum"] = auto_momentum(batches_per_epoch)
        if settings.keys() - {"layers", "exclude"}:
            policies.append(BNPolicy(**settings))
    if policies:
        apply_policy(model, policies)
    elif recipe.model.grad_checkpointing or recipe.train.mixed_precision == "fp16":
        # recomputation must not update the statistics twice, nor an overflow enter them: plain BN does not know
        apply_policy(model, BNPolicy())
    if any(section.parameterisation == "absorbed" for section in recipe.bn_sections):
        _absorb(model, recipe)


def _absorb(model: nn.Module, recipe: Recipe) -> None:
    wants = [f"bn.{key}" for section in recipe.bn_sections for key in MOMENTS if getattr(section, key) is not None]
    wants += ["recalibrate.at"] if recipe.recalibrate.at else []
    if wants:
        raise RecipeError(f"bn.parameterisation=absorbed leaves no statistics to change later: unset {wants[0]}")
    try:
        absorb_bn(model, torch.zeros(1, *input_config(model, recipe.data.image_size)["input_size"]))
    except PolicyError as error:
        raise RecipeError(
            f"bn.parameterisation=absorbed needs fixed statistics: set bn.train_stats=running, bn.update_stats=none "
            f"({error})"
        ) from error
