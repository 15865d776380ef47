"""What the benches of the training loop share: a trainer of a recipe, which can be run again and again."""

from __future__ import annotations

from typing import Any

from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.backbone import build_backbone, input_config, restrict_training
from bnfinetune.training.data.splits import load_splits
from bnfinetune.training.feed import recipe_loaders
from bnfinetune.training.loop import Progress, Trainer
from bnfinetune.training.phases import apply_recipe_policies
from bnfinetune.training.start import seed_ranks, start_accelerator


def trainer_of(name: str, **overrides: Any) -> Trainer:
    """A trainer of a recipe, on this process's device and ranks."""
    recipe = load_recipe(name, overrides)
    accelerator = start_accelerator(recipe.train.mixed_precision)
    splits = load_splits(recipe.data, recipe.run.seed)
    seed_ranks(recipe.run, same_on_all=True)
    model = build_backbone(recipe.model, splits.class_names)
    restrict_training(model, recipe.model.trainable)
    loaders = recipe_loaders(recipe, splits, input_config(model, recipe.data.image_size), accelerator)
    apply_recipe_policies(model, recipe, loaders.train.batches)
    return Trainer(recipe, accelerator, model, loaders, len(splits.class_names))


def fit(trainer: Trainer) -> None:
    """Trains from the first update to the last, without pauses."""
    trainer.progress = Progress()
    trainer.fit(lambda *, evaluate: None)
