"""What the benches of the training loop share: a trainer of a recipe, which can be run again and again."""

from __future__ import annotations

from typing import Any

from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.assembly import assemble
from bnfinetune.training.launch import start_accelerator
from bnfinetune.training.loop.trainer import Progress, Trainer


def trainer_of(name: str, **overrides: Any) -> Trainer:
    """A trainer of a recipe, on this process's device and ranks."""
    recipe = load_recipe(name, overrides)
    return assemble(recipe, start_accelerator(recipe.train.mixed_precision, trains=True), lambda _: None).trainer


def fit(trainer: Trainer) -> None:
    """Trains from the first update to the last, without pauses."""
    trainer.progress = Progress()
    trainer.fit(lambda *, evaluate: None)
