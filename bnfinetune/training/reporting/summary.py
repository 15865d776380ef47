"""What a run shows when it is over: the table, the curves, the summary."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.measuring.metrics import Metrics
from bnfinetune.training.saving.atomic import write_json

_SHOWN = {"top1": "top-1", "top5": "top-5", "macro_f1": "macro F1", "ece": "ECE", "loss": "loss"}
_PACKAGES = ("bnfinetune", "torch", "torchvision", "timm", "accelerate", "datasets", "numpy", "safetensors")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Machine and versions, as far as they bear on the result."""
    device = accelerator.device
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def write_report(
    folder: Path,
    trainer: Trainer,
    before: Mapping[str, Metrics],
    after: Mapping[str, Metrics],
    history: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
) -> None:
    """Write `summary.json`, `curves.png` and `confusion.png` of a finished run.

    The summary's `seconds` count the updates with their wait for data, without evaluations; `data_wait` is the share
    of it spent waiting; `images_per_second` is over all ranks, `peak_memory_bytes` of rank 0.
    """
    progress = trainer.progress
    seconds = progress.seconds + progress.waiting
    last = list(after)[-1]
    summary = {
        "recipe": trainer.recipe.name,
        "model": trainer.recipe.model.name,
        "updates": progress.update,
        "epochs": progress.epoch,
        "best_update": progress.best_update,
        "before": {name: metrics.scalars() for name, metrics in before.items()},
        "after": {name: metrics.scalars() for name, metrics in after.items()},
        "per_class": dict(zip(class_names, after[last].per_class, strict=True)),
        "confusion": after[last].confusion,
        "measured_on": last,
        "images": progress.images,
        "seconds": round(seconds, 3),
        "data_wait": round(progress.waiting / seconds, 4) if seconds else 0.0,
        "images_per_second": round(progress.images / seconds, 1) if seconds else 0.0,
        "peak_memory_bytes": peak_memory_bytes(trainer.accelerator.device),
    }
    write_json(folder / "summary.json", summary)
    draw_curves(folder / "curves.png", history, f"{trainer.recipe.name}: {trainer.recipe.model.name}")
    draw_confusion(folder / "confusion.png", after[last], class_names)


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
    for column in ("images", *_SHOWN.values()):
        table.add_column(column, justify="right")
    for name, metrics in rows.items():
        values = metrics.scalars()
        cells = [f"{values[key]:.3f}" if key in ("loss", "ece") else f"{values[key]:.1%}" for key in _SHOWN]
        table.add_row(name, str(metrics.images), *cells)
    return table


def draw_curves(path: Path, history: Sequence[Mapping[str, Any]], title: str) -> None:
    """Loss, validation accuracy and learning rate over updates, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, accuracy) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    updates = [record["update"] for record in history]
    trained = [record for record in history if record.get("train_loss") is not None]
    losses.plot([r["update"] for r in trained], [r["train_loss"] for r in trained], label="training", color="#4477aa")
    losses.plot(updates, [r["loss"] for r in history], label="validation", color="#ee6677")
    losses.set(xlabel="optimizer updates", ylabel="loss", ylim=(0, None))
    losses.legend(frameon=False)
    accuracy.plot(updates, [100 * r["top1"] for r in history], label="top-1", color="#228833")
    accuracy.plot(updates, [100 * r["macro_f1"] for r in history], label="macro F1", color="#ccbb44", linestyle="--")
    accuracy.set(xlabel="optimizer updates", ylabel="validation, %", ylim=(None, 100))
    accuracy.legend(frameon=False, loc="lower right")
    for axis in (losses, accuracy):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_confusion(path: Path, metrics: Metrics, class_names: Sequence[str]) -> None:
    """The confusion matrix, rows normalised to the class's images, as a PNG. Names beyond 40 classes are left out."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    counts = torch.tensor(metrics.confusion, dtype=torch.float64)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(3 + 0.28 * len(class_names), 14)
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(class_names) <= 40:
        # names come from data: `parse_math` off, so that a $ in one is only a character
        labels = [name[:24] for name in class_names]
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, parse_math=False)
        axis.set_yticks(range(len(labels)), labels, fontsize=7, parse_math=False)
    if len(class_names) <= 20:
        for row, column in counts.nonzero().tolist():
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=7, color=color)
    axis.set(xlabel="predicted", ylabel="true", title=f"{metrics.images} images, top-1 {metrics.top1:.1%}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
