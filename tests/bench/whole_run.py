"""A whole run, from the command to its exit, against timm's train.py on the same images: what a user waits for.

    python -m tests.bench whole_run --timm-train path/to/timm/train.py

Both tools run as processes, in turn, with the same network of random weights, images, sizes, epochs, batches and loader
processes, and measure on the validation images after every epoch. The rest is each tool's own default: this project
measures before training too, keeps states to resume from, and draws its report. Wall time and the CPU time of a tool's
processes are compared pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench import timm_script
from tests.bench.folders import write_jpegs
from tests.bench.results import record

OURS, TIMM = "bnfinetune", "timm train.py"
CLASSES = 4
RUN = timm_script.RUN


@dataclass(frozen=True)
class Setting:
    """What both tools are asked for.

    Attributes:
        model: timm's name.
        photo: longer side of the JPEG files, in pixels.
        images: training images; a quarter as many to validate.
        size: side of the network's input.
        epochs: over the training images.
        batch: images per update.
        workers: loader processes.
        recipe: what this project runs; timm's script has one way, which is `full`.
    """

    model: str
    photo: int
    images: int
    size: int
    epochs: int
    batch: int
    workers: int
    recipe: str

    @property
    def title(self) -> str:
        return (
            f"{self.recipe}: {self.model} at {self.size} px, {self.images} JPEGs of {self.photo} px, {self.epochs} "
            f"epochs, batches of {self.batch}, {self.workers} workers"
        )


@dataclass(frozen=True)
class Spent:
    """One run: seconds on the clock, seconds of CPU in all its processes, best top-1 on validation in percent."""

    wall: float
    cpu: float
    top1: float


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench whole_run", description=__doc__)
    parser.add_argument("--timm-train", type=Path, required=True, help="timm's train.py, from its repository")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--photo", type=int, default=640, help="longer side of the JPEG files")
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=["full", "freeze_bn", "linear_probe"])
    parser.add_argument("--pairs", type=int, default=3, help="runs of both tools")
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/benchmarks.md")
    options = parser.parse_args(arguments)
    shared = {key: getattr(options, key) for key in ("model", "photo", "images", "size", "epochs", "batch", "workers")}
    with tempfile.TemporaryDirectory(prefix="bnfinetune-whole-run-") as name:
        folder = Path(name)
        each = options.images // CLASSES
        write_jpegs(folder / "images", classes=CLASSES, train=each, val=each // 4, size=options.photo)
        for recipe in options.recipes:
            setting = Setting(recipe=recipe, **shared)
            spent: dict[str, list[Spent]] = {OURS: [], TIMM: []}
            for number in range(options.pairs):
                for tool in list(spent)[:: -1 if number % 2 else 1]:
                    spent[tool].append(_run(tool, setting, folder, options.timm_train))
            rows = [_row(spent, clock) for clock in ("wall", "cpu")]
            print(setting.title, *rows, sep="\n")
            if options.record:
                record("whole_run", f"{setting.title}; {options.pairs} pairs", {"rows": rows})


def _row(spent: dict[str, list[Spent]], clock: str) -> dict[str, object]:
    """Medians of both tools, this project's share of timm's time pair by pair, and what accuracy it bought."""
    seconds = {tool: [getattr(run, clock) for run in runs] for tool, runs in spent.items()}
    ratios = sorted(ours / theirs for ours, theirs in zip(seconds[OURS], seconds[TIMM], strict=True))
    return {
        "name": f"{clock} time",
        **{f"{tool}, s": round(median(values), 1) for tool, values in seconds.items()},
        "ratio": median(ratios),
        "of the pairs": [ratios[0], ratios[-1]],
        **{f"{tool}, top-1 %": round(sum(run.top1 for run in runs) / len(runs), 1) for tool, runs in spent.items()},
    }


def _run(tool: str, setting: Setting, folder: Path, script: Path) -> Spent:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        images, output = folder / "images", Path(name)
        command = _ours(setting, images, output) if tool == OURS else _timm(setting, images, output, script)
        before, begin = os.times(), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=name)
        wall, after = time.perf_counter() - begin, os.times()
        if done.returncode:
            raise SystemExit(f"{tool} failed: {done.stderr.strip().splitlines()[-1]}")
        top1 = _top1_of_ours(output) if tool == OURS else timm_script.best_validation(output)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Spent(wall, cpu, top1)


def _ours(setting: Setting, images: Path, output: Path) -> list[str]:
    settings = {
        "recipe": setting.recipe,
        "model.name": setting.model,
        "model.pretrained": "false",
        "data.source": images,
        "data.image_size": setting.size,
        "data.workers": setting.workers,
        "train.epochs": setting.epochs,
        "train.batch_size": setting.batch,
        "run.dir": output / RUN,
    }
    return [sys.executable, "-m", "bnfinetune", *(f"{key}={value}" for key, value in settings.items())]


def _timm(setting: Setting, images: Path, output: Path, script: Path) -> list[str]:
    return timm_script.command(
        script,
        data=images,
        output=output,
        model=setting.model,
        classes=CLASSES,
        size=setting.size,
        batch=setting.batch,
        epochs=setting.epochs,
        workers=setting.workers,
        lr=3e-4,
    )


def _top1_of_ours(output: Path) -> float:
    summary = json.loads((output / RUN / "summary.json").read_text(encoding="utf-8"))
    return 100 * float(summary["after"]["validation"]["top1"])
