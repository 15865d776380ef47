"""timm's own train.py as a command, with its defaults where a bench does not say otherwise."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

RUN = "run"  # the folder that it makes in its output


def command(
    script: Path,
    *,
    data: Path,
    output: Path,
    model: str,
    classes: int,
    size: int,
    batch: int,
    epochs: int,
    **more: object,
) -> list[str]:
    """The words of a run on a CPU that reads the splits `train` and `val`, with AdamW and no warm-up.

    Args:
        script: timm's train.py.
        data: a folder with `train` and `val`.
        output: where the run's folder goes.
        model: timm's name.
        classes: of the images.
        size: side of the network's input.
        batch: images per update.
        epochs: over the training images.
        more: further options, with underscores for their hyphens.
    """
    options = {
        "data-dir": data,
        "train-split": "train",
        "val-split": "val",
        "model": model,
        "num-classes": classes,
        "img-size": size,
        "batch-size": batch,
        "epochs": epochs,
        "opt": "adamw",
        "warmup-epochs": 0,
        "device": "cpu",
        "output": output,
        "experiment": RUN,
        "checkpoint-hist": 1,
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return [
        sys.executable,
        str(script.resolve()),
        *(word for key, value in options.items() for word in (f"--{key}", str(value))),
    ]


def best_validation(output: Path) -> float:
    """The best top-1 on the validation images, in percent."""
    with (output / RUN / "summary.csv").open(encoding="utf-8") as file:
        return max(float(row["eval_top1"]) for row in csv.DictReader(file))
