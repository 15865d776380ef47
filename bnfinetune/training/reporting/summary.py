"""What a run shows when it is over: the table, the summary, the page."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table
from rich.text import Text

from bnfinetune.diagnose.finding import Findings
from bnfinetune.diagnose.run_report import SHARES
from bnfinetune.machine import software
from bnfinetune.training.assembly import Assembly
from bnfinetune.training.ending import Best
from bnfinetune.training.measuring.metrics import Metrics
from bnfinetune.training.measuring.outcomes import write_outcomes
from bnfinetune.training.record import Record
from bnfinetune.training.reporting.lines import as_text
from bnfinetune.training.reporting.report_page import write_page
from bnfinetune.training.saving.atomic import in_words, write_json
from bnfinetune.training.saving.run_folder import SUMMARY, UNREADABLE, RunFolder

_SHOWN = SHARES | {"ece": "ECE", "loss": "loss"}


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Machine and versions, as far as they bear on the result."""
    device = accelerator.device
    return {
        **software(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
    }


def write_report(
    setup: Assembly, folder: RunFolder, record: Record, best: Best, findings: Findings, say: Callable[[str], None]
) -> None:
    """Write `summary.json` and, where `run.report` asks for it, the page of a finished run, and say what came of it."""
    if not setup.trainer.accelerator.is_main_process:
        return
    clock = setup.trainer.clock
    loaders = setup.trainer.loaders.measured
    write_outcomes(folder.path, {name: each.columns(loaders[name].dataset) for name, each in best.outcomes.items()})
    with in_words(f"the report in {folder.path}"):
        if best.mistakes is not None:
            with clock.part("page"):
                write_page(setup, folder, record, best, findings)
        numbers = summary(setup, record, best)
        write_json(folder.path / SUMMARY, numbers)
    moments = {"before": record.before, "after": best.after}
    rows = {f"{split} {when}": measured[split] for split in best.after for when, measured in moments.items()}
    say(as_text(metrics_table(rows)))
    if record.unreadable:
        say(f"{len(record.unreadable)} unreadable images were left out: {folder.path / UNREADABLE}")
    if numbers["images"]:
        say(f"trained in {numbers['seconds']:,.1f} s, {numbers['images_per_second']:,.0f} images/s")
    say(f"in all {clock}")
    say(f"best network of {record.best_of(numbers['best_update'])}: {folder.best}")
    if best.mistakes is not None:
        say(f"a page to look at: {folder.path / 'report.html'}")


def summary(setup: Assembly, record: Record, best: Best) -> dict[str, Any]:
    """A finished run in numbers.

    `seconds` count the updates with their wait for data, without evaluations; `data_wait` is the share of it spent
    waiting; `time` is where all of the time since the last start has gone, by part of the run, on rank 0;
    `images_per_second` is over all ranks, `peak_memory_bytes` of rank 0.
    """
    trainer, progress = setup.trainer, setup.trainer.progress
    last = list(best.after)[-1]
    return {
        "recipe": trainer.recipe.name,
        "model": trainer.recipe.model.name,
        "updates": progress.update,
        "epochs": progress.epoch,
        "best_update": progress.best_update,
        "average": record.average,
        "before": {name: metrics.scalars() for name, metrics in record.before.items()},
        "after": {name: metrics.scalars() for name, metrics in best.after.items()},
        "per_class": dict(zip(setup.splits.class_names, best.after[last].per_class, strict=True)),
        "confusion": best.after[last].confusion,
        "measured_on": last,
        "images": progress.images,
        "seconds": round(progress.time, 3),
        "data_wait": round(progress.waiting / progress.time, 4) if progress.time else 0.0,
        "time": trainer.clock.read(),
        "images_per_second": round(progress.rate, 1),
        "peak_memory_bytes": peak_memory_bytes(trainer.accelerator.device),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory of this process: on the device if it is CUDA, else resident in the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss is in kilobytes, but in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def metrics_table(rows: Mapping[str, Metrics]) -> Table:
    """One row per measurement, such as `test before` and `test after`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    known = {key for metrics in rows.values() for key in metrics.scalars()}
    shown = {key: title for key, title in _SHOWN.items() if key in known}
    for column in ("images", *shown.values()):
        table.add_column(column, justify="right")
    for name, metrics in rows.items():
        values = metrics.scalars()
        cells = [f"{values[key]:.1%}" if key in SHARES else f"{values[key]:.3f}" for key in shown]
        table.add_row(Text(name), str(metrics.images), *cells)
    return table
