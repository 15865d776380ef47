"""The doctor for recipes and checkpoints: what `bnfinetune check` and `bnfinetune inspect` call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bnfinetune.diagnose.drift import inspect_bn
from bnfinetune.diagnose.drift_report import DriftReport
from bnfinetune.diagnose.finding import Findings
from bnfinetune.diagnose.recommend import Situation, recommend
from bnfinetune.diagnose.report import drift_page
from bnfinetune.diagnose.set_up import check_set_up
from bnfinetune.diagnose.watch import watch_bn
from bnfinetune.recipe import Recipe
from bnfinetune.training.backbone import build_backbone, input_config, restrict_training
from bnfinetune.training.data.splits import load_splits
from bnfinetune.training.evaluate import checkpoint_recipe, load_exported
from bnfinetune.training.feed import recipe_loaders
from bnfinetune.training.loop import Trainer
from bnfinetune.training.phases import apply_recipe_policies
from bnfinetune.training.recalibrate import recalibrate
from bnfinetune.training.start import seed_ranks, start_accelerator


def check_recipe(recipe: Recipe, *, steps: int = 3, ignore: Sequence[str] = ()) -> Findings:
    """Judges a recipe by its set-up and by a dry run of a few updates; writes nothing.

    Args:
        recipe: the recipe.
        steps: updates of the dry run; 0 judges the set-up alone.
        ignore: codes of rules to leave out.

    Returns:
        Findings whose fixes are recipe keys where keys can mend them.

    Raises:
        BnFinetuneError: the recipe's network or data cannot be used.
    """
    trainer = _dry_trainer(recipe)
    model, ranks = trainer.model, trainer.accelerator.num_processes
    try:
        found = check_set_up(recipe, model, trainer.optimizer, updates=trainer.updates, ranks=ranks, ignore=ignore)
        if not (steps and trainer.updates and trainer.has_bn):
            return found
        if "start" in recipe.recalibrate.at:
            recalibrate(model, trainer.loaders, recipe, trainer.accelerator)
        planned, trainer.updates = trainer.updates, min(steps, trainer.updates)
        with watch_bn(trainer.forward, trainer.optimizer, ignore=ignore) as watch:
            trainer.fit(_no_pause)
        trace = watch.trace
        found += check_set_up(recipe, model, trainer.optimizer, updates=planned, trace=trace, ignore=ignore)
        return Findings(dict.fromkeys(found))
    finally:
        trainer.loaders.close()


def _no_pause(*, evaluate: bool) -> None:
    """A dry run neither evaluates nor saves."""


def _dry_trainer(recipe: Recipe) -> Trainer:
    accelerator = start_accelerator(recipe.train.mixed_precision)
    splits = load_splits(recipe.data, recipe.run.seed)
    seed_ranks(recipe.run, same_on_all=True)
    model = build_backbone(recipe.model, splits.class_names)
    restrict_training(model, recipe.model.trainable)
    loaders = recipe_loaders(recipe, splits, input_config(model, recipe.data.image_size), accelerator)
    apply_recipe_policies(model, recipe, loaders.train.batches)
    return Trainer(recipe, accelerator, model, loaders, len(splits.class_names))


def inspect_checkpoint(
    checkpoint: str,
    overrides: Sequence[str] = (),
    *,
    images: int = 256,
    page: str | Path | None = None,
) -> DriftReport:
    """Measures an exported network's statistics on a data set; `bnfinetune inspect` calls this.

    The images are those of `data.train_split`, shuffled and prepared as for evaluation, in batches of
    `train.batch_size`. Labels are used where the classes are the network's.

    Args:
        checkpoint: a run folder, an exported folder such as RUN/best, or any folder that timm saved.
        overrides: overrides of the recipe saved in the folder, such as `data.source=path`.
        images: how many images to measure.
        page: where to write the report as a page, with the same numbers as JSON beside it; nowhere by default.

    Raises:
        CheckpointError: the folder holds no network.
        DataError: the data cannot be used.
    """
    folder, recipe = checkpoint_recipe(checkpoint, overrides)
    accelerator = start_accelerator(recipe.train.mixed_precision)
    model = load_exported(folder).to(accelerator.device)
    splits = load_splits(recipe.data, recipe.run.seed)
    loaders = recipe_loaders(recipe, splits, input_config(model, recipe.data.image_size), accelerator)
    known = tuple(model.pretrained_cfg.get("label_names") or ()) == tuple(splits.class_names)
    try:
        batches = _batches(loaders.stats, images, recipe.train.batch_size, labelled=known)
    finally:
        loaders.close()
    report = inspect_bn(model, batches, images=images, training_images=loaders.stats.images)
    if page is not None:
        path = Path(page)
        path.parent.mkdir(parents=True, exist_ok=True)
        advice = recommend(Situation.of(report, ranks=accelerator.num_processes))
        title = f"{folder}: statistics against {recipe.data.source}"
        drift_page(report, title=title, recommendation=advice).write(path)
        report.save(path.with_suffix(".json"))
    return report


def _batches(loader: object, images: int, size: int, *, labelled: bool) -> list[Tensor | tuple[Tensor, Tensor]]:
    """The first images of a loader, with labels if asked for, in batches of another size."""
    pictures: list[Tensor] = []
    labels: list[Tensor] = []
    for found, marks, *_ in loader:  # type: ignore[attr-defined]
        pictures.append(found)
        labels.append(marks)
        if sum(map(len, pictures)) >= images:
            break
    parts = torch.cat(pictures)[:images].split(size)
    marks = torch.cat(labels)[:images].split(size)
    return list(zip(parts, marks, strict=True)) if labelled else list(parts)
