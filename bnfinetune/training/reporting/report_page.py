"""The page of a run, finished or not, `report.html`, and the same in numbers, `report.json`."""

from __future__ import annotations

import json
import platform
import shlex
from typing import Any

import timm
import torch

from bnfinetune.diagnose.finding import Findings, render
from bnfinetune.diagnose.run_report import RunStory, run_page
from bnfinetune.recipe_files import dump_recipe
from bnfinetune.training.assembly import Assembly
from bnfinetune.training.ending import Best
from bnfinetune.training.launch import GlobalBatch
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.measuring.mistakes import pictures, told
from bnfinetune.training.network.optim import rate_of
from bnfinetune.training.record import Record
from bnfinetune.training.saving.atomic import write_json, write_text
from bnfinetune.training.saving.run_folder import RunFolder
from bnfinetune.training.saving.timm_folder import RECIPE


def write_page(setup: Assembly, folder: RunFolder, record: Record, best: Best, findings: Findings) -> None:
    """Write `report.html` and `report.json` into a run's folder."""
    trainer, recipe, class_names = setup.trainer, setup.trainer.recipe, setup.splits.class_names
    last, worst = list(best.after)[-1], [] if best.mistakes is None else best.mistakes.worst
    reader: Any = trainer.loaders.measured[last].dataset
    progress = trainer.progress
    running = "" if trainer.is_over else f" (running, update {progress.update} of {trainer.updates})"
    story = RunStory(
        title=f"{recipe.name}: {recipe.model.name} on {recipe.data.source}{running}",
        before={name: metrics.scalars() for name, metrics in record.before.items()},
        after={name: metrics.scalars() for name, metrics in best.after.items()},
        history=[{"update": 0} | record.before["validation"].scalars() | dict(best.drift_at_start), *record.history],
        best_update=progress.best_update,
        numbers={"best network": f"{record.best_of(progress.best_update)} of {progress.update}"},
        confusion=best.after[last].confusion,
        class_names=class_names,
        per_class=dict(zip(class_names, best.after[last].per_class, strict=True)),
        thresholds=best.after[last].thresholds,
        mistakes=pictures(worst, reader, class_names, setup.data_config),
        drift=best.drift,
        findings=findings,
        settings=_settings(trainer),
        recipe=dump_recipe(recipe),
        command=f"python -m bnfinetune {shlex.quote(f'recipe={folder.path}/{RECIPE}')}",
    )
    write_text(folder.path / "report.html", run_page(story).html())
    wrong = told(worst, reader, class_names)
    numbers = {"measured_on": last, "most_wrong": wrong, "findings": json.loads(render(findings, "json"))}
    write_json(folder.path / "report.json", numbers | {"bn": None if best.drift is None else best.drift.to_dict()})


def _settings(trainer: Trainer) -> dict[str, str]:
    """What the run was made with, in the words of the recipe's keys."""
    recipe, progress, device = trainer.recipe, trainer.progress, trainer.accelerator.device
    optim, batch = recipe.optim, GlobalBatch.of(recipe, trainer.accelerator.num_processes)
    threads = torch.get_num_threads()
    speed = f"{progress.rate:,.0f} images/s" if progress.images else "no update"
    rate = f"learning rate {rate_of(optim):g} ({optim.schedule.name})"
    return {
        "updates": f"{progress.update} in {progress.epoch} epochs, batches of {batch}",
        "optimizer": f"{optim.name}, {rate}, decay {optim.weight_decay:g}",
        "time": f"{progress.time:,.1f} s in updates, {speed}",
        "whole run": str(trainer.clock),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {threads}",
        "precision": {"no": "float32"}.get(trainer.accelerator.mixed_precision, trainer.accelerator.mixed_precision),
        "seed": str(recipe.run.seed),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
    }
