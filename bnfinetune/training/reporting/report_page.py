"""The page of a finished run, `report.html`, and the same in numbers, `report.json`."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from bnfinetune.diagnose.drift_report import DriftReport
from bnfinetune.diagnose.finding import Findings, render
from bnfinetune.diagnose.run_report import RunStory, run_page
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.measuring.metrics import Metrics
from bnfinetune.training.measuring.mistakes import Mistake, image_label, pictures
from bnfinetune.training.saving.atomic import write_json, write_text


def write_page(
    folder: Path,
    trainer: Trainer,
    recipe_text: str,
    class_names: Sequence[str],
    data_config: Mapping[str, Any],
    *,
    before: Mapping[str, Metrics],
    after: Mapping[str, Metrics],
    history: Sequence[Mapping[str, Any]],
    mistakes: Sequence[Mistake],
    drift: DriftReport | None,
    drift_at_start: Mapping[str, float],
    findings: Findings,
) -> None:
    """Write `report.html` and `report.json` into a run's folder.

    Args:
        folder: The run's folder.
        trainer: What trained.
        recipe_text: The resolved recipe.
        class_names: Names of the classes, in order.
        data_config: timm's preprocessing.
        before: Metrics by split before training.
        after: The same of the best network; the last split is that of `mistakes`.
        history: One record per evaluation.
        mistakes: From `measure`.
        drift: Statistics of the best network; None without BN.
        drift_at_start: What `DriftMeter.read` gave before training.
        findings: Of the checks before training.
    """
    recipe, last = trainer.recipe, list(after)[-1]
    split: Any = {"validation": trainer.loaders.val, "test": trainer.loaders.test}[last]
    story = RunStory(
        title=f"{recipe.name}: {recipe.model.name} on {recipe.data.source}",
        before={name: metrics.scalars() for name, metrics in before.items()},
        after={name: metrics.scalars() for name, metrics in after.items()},
        history=[{"update": 0} | before["validation"].scalars() | dict(drift_at_start), *history],
        best_update=trainer.progress.best_update,
        numbers={"best update": f"{trainer.progress.best_update} of {trainer.progress.update}"},
        confusion=after[last].confusion,
        class_names=class_names,
        per_class=dict(zip(class_names, after[last].per_class, strict=True)),
        mistakes=pictures(mistakes, split.dataset, class_names, data_config),
        drift=drift,
        findings=findings,
        settings=_settings(trainer),
        recipe=recipe_text,
        command=f"python -m bnfinetune {shlex.quote(f'recipe={folder}/recipe.yaml')}",
    )
    write_text(folder / "report.html", run_page(story).html())
    wrong = [
        {"image": image_label(split.dataset, each.number)}
        | {"class": class_names[each.label], "taken_for": class_names[each.predicted]}
        | {"likelihood": each.likelihood, "confidence": each.confidence}
        for each in mistakes
    ]
    numbers = {"measured_on": last, "most_wrong": wrong, "findings": json.loads(render(findings, "json"))}
    write_json(folder / "report.json", numbers | {"bn": None if drift is None else drift.to_dict()})


def _settings(trainer: Trainer) -> dict[str, str]:
    """What the run was made with, in the words of the recipe's keys."""
    recipe, progress, device = trainer.recipe, trainer.progress, trainer.accelerator.device
    optim, ranks = recipe.optim, trainer.accelerator.num_processes
    batch = " x ".join(str(n) for n in (ranks, recipe.train.batch_size, recipe.train.grad_accum) if n > 1) or "1"
    seconds = progress.seconds + progress.waiting
    cuda = device.type == "cuda"
    rate = f"{progress.images / seconds:,.0f} images/s" if seconds else "no update"
    return {
        "updates": f"{progress.update} in {progress.epoch} epochs, batches of {batch}",
        "optimizer": f"{optim.name}, learning rate {optim.lr:g} ({optim.schedule.name}), decay {optim.weight_decay:g}",
        "time": f"{seconds:,.1f} s in updates, {rate}",
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, threads: {torch.get_num_threads()}",
        "precision": {"no": "float32"}.get(recipe.train.mixed_precision, recipe.train.mixed_precision),
        "seed": str(recipe.run.seed),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
    }
