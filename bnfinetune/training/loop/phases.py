"""When BN layers freeze or unfreeze during a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bnfinetune.bn.absorb import absorb_bn
from bnfinetune.bn.policy.apply import apply_policy, unfreeze_bn
from bnfinetune.bn.policy.spec import BNPolicy, auto_momentum
from bnfinetune.errors import PolicyError, RecipeError
from bnfinetune.recipe import BN, Recipe
from bnfinetune.training.network.backbone import input_config

_MOMENTS = ("freeze_after", "unfreeze_after")
_NO_POLICY = {*_MOMENTS, "fold", "parameterisation"}  # what other code reads


@dataclass(frozen=True)
class Phase:
    """A change of BN layers after `update` optimizer updates: `section` says which layers, `freeze` to what."""

    update: int
    freeze: bool
    section: BN

    def __str__(self) -> str:
        layers = self.section.layers if isinstance(self.section.layers, str) else ", ".join(self.section.layers)
        action = "statistics re-estimated, then frozen with the affine" if self.freeze else "unfrozen"
        return f"layers {layers} {action}"

    def apply(self, model: nn.Module) -> None:
        """Freeze statistics and affine of the layers, or bring back what they did before they froze."""
        if self.freeze:
            frozen = {"train_stats": "running", "update_stats": "none", "affine": "frozen"}
            apply_policy(model, BNPolicy(**frozen, layers=self.section.layers, exclude=self.section.exclude))  # type: ignore[arg-type]
        else:
            unfreeze_bn(model, layers=self.section.layers)


def sections_of(recipe: Recipe) -> tuple[BN, ...]:
    """The recipe's `bn` sections, in order."""
    return recipe.bn if isinstance(recipe.bn, tuple) else (recipe.bn,)


def apply_recipe_policies(model: nn.Module, recipe: Recipe, batches_per_epoch: int | None) -> None:
    """Apply the policies of a recipe's `bn` section; one that sets no switch leaves the network as it is."""
    policies = []
    for section in sections_of(recipe):
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
    if any(section.parameterisation == "absorbed" for section in sections_of(recipe)):
        _absorb(model, recipe)


def _absorb(model: nn.Module, recipe: Recipe) -> None:
    wants = [f"bn.{key}" for section in sections_of(recipe) for key in _MOMENTS if getattr(section, key) is not None]
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


def planned_phases(recipe: Recipe, updates: int, updates_per_epoch: int | None) -> list[Phase]:
    """The freezes and unfreezes of a recipe, by update.

    Raises:
        RecipeError: A number of epochs is asked of a stream, or a change comes after the end.
    """
    phases = [
        Phase(_moment(key, value, updates, updates_per_epoch), key == "freeze_after", section)
        for section in sections_of(recipe)
        for key in _MOMENTS
        if (value := getattr(section, key)) is not None
    ]
    return sorted(phases, key=lambda phase: phase.update)


def _moment(key: str, value: float, updates: int, updates_per_epoch: int | None) -> int:
    if value < 1:
        return round(value * updates)
    if updates_per_epoch is None:
        raise RecipeError(f"bn.{key}={value:g} counts epochs, which a stream has not; give a share below 1")
    moment = round(value * updates_per_epoch)
    if moment >= updates:
        last = updates / updates_per_epoch
        raise RecipeError(f"bn.{key}={value:g} is not before the end of the last epoch ({last:g}); make it smaller")
    return moment
