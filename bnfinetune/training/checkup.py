"""The doctor for recipes and checkpoints: what `bnfinetune check` and `bnfinetune inspect` call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnfinetune.diagnose.checks import check_bn
from bnfinetune.diagnose.drift import inspect_bn
from bnfinetune.diagnose.drift_report import DriftReport
from bnfinetune.diagnose.finding import Findings, render
from bnfinetune.diagnose.readout import Readout
from bnfinetune.diagnose.recommend import Recommendation, Situation, recommend
from bnfinetune.diagnose.report import drift_page
from bnfinetune.diagnose.set_up import check_set_up
from bnfinetune.diagnose.watch import watch_bn
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import diff_recipes, load_recipe
from bnfinetune.training.assembly import assemble
from bnfinetune.training.data.from_recipe import recipe_loaders
from bnfinetune.training.launch import start_accelerator
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.measuring.measure import Exported
from bnfinetune.training.measuring.prior import read_out
from bnfinetune.training.measuring.recalibrate import recalibrate
from bnfinetune.training.network.backbone import input_config


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
            recalibrate(model, trainer.loaders, recipe, trainer.accelerator, judge="features")
        planned, trainer.updates = trainer.updates, min(steps, trainer.updates)
        with watch_bn(trainer.forward, trainer.optimizer, ignore=ignore) as watch:
            trainer.fit(_no_pause)
        trace = watch.trace
        return found.joined(
            check_set_up(recipe, model, trainer.optimizer, updates=planned, ranks=ranks, trace=trace, ignore=ignore)
        )
    finally:
        trainer.loaders.close()


def _no_pause(*, evaluate: bool) -> None:
    """A dry run neither evaluates nor saves."""


def _dry_trainer(recipe: Recipe) -> Trainer:
    return assemble(recipe, start_accelerator(recipe.train.mixed_precision, trains=True), lambda _: None).trainer


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found; prints as a table with the recommendation below it.

    Attributes:
        report: the measurements.
        readout: what statistics of the images would be worth to a new head; None without labels.
        advice: which recipe fits.
        findings: pitfalls of the network as it would train.
    """

    report: DriftReport
    readout: Readout | None
    advice: Recommendation
    findings: Findings

    def __str__(self) -> str:
        found = [str(self.findings)] if self.findings else []
        worth = [] if self.readout is None else [self.readout.verdict]
        return "\n\n".join([*worth, str(self.report), str(self.advice), *found])

    def to_dict(self) -> dict[str, Any]:
        """The report's numbers, the recommendation and the findings."""
        advice = asdict(self.advice) | {"command": self.advice.command}
        return self.report.to_dict() | {
            "readout": None if self.readout is None else self.readout.to_dict(),
            "recommendation": advice,
            "findings": json.loads(render(self.findings, "json")),
        }

    def write(self, page: Path, title: str) -> None:
        """Writes a page, and the same numbers as JSON beside it."""
        page.parent.mkdir(parents=True, exist_ok=True)
        shown = drift_page(
            self.report, title=title, findings=self.findings, recommendation=self.advice, readout=self.readout
        )
        shown.write(page)
        page.with_suffix(".json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def inspect_checkpoint(
    checkpoint: str,
    overrides: Sequence[str] = (),
    *,
    images: int = 256,
    page: str | Path | None = None,
    minutes: float | None = None,
) -> Inspection:
    """Measures an exported network's statistics on a data set; `bnfinetune inspect` calls this.

    The images are those of `data.train_split`, shuffled and prepared as for evaluation, in batches of
    `train.batch_size`. Labels tell what statistics of these images would be worth to a new head and, where the classes
    are the network's and an image has one, what they are worth to its own.

    Args:
        checkpoint: a run folder, an exported folder such as RUN/best, or any folder that timm saved.
        overrides: overrides of the recipe saved in the folder, such as `data.source=path`.
        images: how many images to measure.
        page: where to write the report as a page, with the same numbers as JSON beside it; nowhere by default.
        minutes: after which no further cause of statistics that do not fit is looked for.

    Raises:
        CheckpointError: the folder holds no network.
        DataError: the data cannot be used.
    """
    exported = Exported.open(checkpoint, overrides)
    accelerator, folder, recipe, model, _ = exported
    splits = exported.splits(overrides, any_classes=True)
    loaders = recipe_loaders(recipe, splits, input_config(model, recipe.data.image_size), accelerator)
    try:
        batches = _batches(loaders.stats, images, recipe.train.batch_size)
    finally:
        loaders.close()
    readout = read_out(model, batches, accelerator) if _has_classes(batches) else None
    known = batches if exported.knows(splits) else [pictures for pictures, _ in batches]
    report = inspect_bn(
        model,
        known,
        images=images,
        training_images=loaders.stats.images,
        minutes=minutes,
        progress=accelerator.is_main_process,
    )
    advice = recommend(Situation.of(report, ranks=accelerator.num_processes, readout=readout))
    findings = check_bn(
        model.train(), batch_size=recipe.train.batch_size, grad_accum=recipe.train.grad_accum, ignore=["BN108"]
    )
    advice = replace(advice, overrides=(*advice.overrides, *_to_go_on(folder, recipe)))
    found = Inspection(report, readout, advice, findings)
    if page is not None and accelerator.is_main_process:
        found.write(Path(page), f"{folder}: statistics against {recipe.data.source}")
    return found


def _to_go_on(folder: Path, recipe: Recipe) -> list[str]:
    """Overrides that train an exported network further on the same data."""
    data = (
        "task",
        "source",
        "config",
        "train_split",
        "val_split",
        "test_split",
        "train_samples",
        "image_column",
        "label_column",
    )
    kept = ["data.image_size", *(f"data.{key}" for key in data)]
    differing = diff_recipes(load_recipe({}), recipe)
    return [f"model.name=local-dir:{folder}", *(f"{key}={differing[key][1]}" for key in kept if key in differing)]


def _batches(loader: object, images: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """The first images of a loader with their labels, in batches of another size."""
    pictures: list[Tensor] = []
    labels: list[Tensor] = []
    for found, marks, *_ in loader:  # type: ignore[attr-defined]
        pictures.append(found)
        labels.append(marks)
        if sum(map(len, pictures)) >= images:
            break
    parts = torch.cat(pictures)[:images].split(size)
    marks = torch.cat(labels)[:images].split(size)
    return list(zip(parts, marks, strict=True))


def _has_classes(batches: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the images are of more classes than one."""
    labels = torch.cat([marks for _, marks in batches])
    return bool((labels != labels[0]).any())
