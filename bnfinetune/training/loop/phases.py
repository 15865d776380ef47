"""When BN layers freeze or unfreeze during a run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bnfinetune.bn.policy.apply import apply_policy, unfreeze_bn
from bnfinetune.bn.policy.spec import BNPolicy
from bnfinetune.errors import RecipeError
from bnfinetune.recipe import BN, Recipe
from bnfinetune.training.network.policies import MOMENTS


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
            unfreeze_bn(model, layers=self.section.layers, exclude=self.section.exclude)


def planned_phases(recipe: Recipe, updates: int, updates_per_epoch: int | None) -> list[Phase]:
    """The freezes and unfreezes of a recipe, by update.

    Raises:
        RecipeError: A number of epochs is asked of a stream, or a change comes after the end.
    """
    phases = [
        Phase(_moment(key, value, updates, updates_per_epoch), key == "freeze_after", section)
        for section in recipe.bn_sections
        for key in MOMENTS
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
