"""A linear probe of 20 epochs on features computed once, against the same head behind the backbone in each epoch.

Training is timed, features included, and the whole run, with its set-up, measurements and saving.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from safetensors.torch import save_file

import bnfinetune as bnf
from bnfinetune.training import run as runs
from tests.bench.folders import write_jpegs
from tests.bench.results import record

EACH, ONCE = "backbone in each epoch", "features once"
WAYS = {EACH: "off", ONCE: "auto"}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench linear_probe", description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="side of the network's input")
    parser.add_argument("--images", type=int, default=640, help="training images; a quarter as many to validate")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/benchmarks.md")
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jpegs(folder / "images", train=options.images // 4, val=options.images // 16, size=160)
        torch.manual_seed(0)
        save_file(timm.create_model(options.model, num_classes=4).state_dict(), folder / "start.safetensors")
        for number in range(options.rounds):
            for way in list(WAYS)[:: -1 if number % 2 else 1]:
                found[way].append(one_run(folder, options, WAYS[way]))
    rows = [row for part in ("training", "whole run") for row in _rows(found, part)]
    what = f"{options.model} at {options.size} px, {options.images} images, {options.epochs} epochs, batches of 32"
    print(what, *rows, sep="\n")
    if options.record:
        record("linear_probe", what, {"rows": rows, "rounds": options.rounds})


def one_run(folder: Path, options: argparse.Namespace, features: str) -> dict[str, float]:
    """Seconds of training and of the whole run, and the accuracy."""
    seconds: dict[str, float] = {}
    inner = runs.features_instead_of_images

    @contextmanager
    def timed(*args: Any) -> Iterator[None]:
        begin = time.perf_counter()
        with inner(*args):
            yield
        seconds["training"] = time.perf_counter() - begin

    settings = {
        "model.name": options.model,
        "model.checkpoint": str(folder / "start.safetensors"),
        "data.source": str(folder / "images"),
        "data.image_size": options.size,
        "data.workers": 0,
        "data.augment": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0},
        "train.epochs": options.epochs,
        "train.batch_size": 32,
        "train.cache_features": features,
        "evaluate.every_epochs": options.epochs,
        "run.report": False,
        "run.check": "off",
        "run.dir": str(folder / "run"),
    }
    begin = time.perf_counter()
    with mock.patch.object(runs, "features_instead_of_images", timed):
        result = bnf.finetune("linear_probe", **settings)
    seconds["whole run"] = time.perf_counter() - begin
    shutil.rmtree(folder / "run")
    return {**seconds, "top1": result.after["validation"].top1}


def _rows(found: dict[str, list[dict[str, float]]], part: str) -> Iterator[dict[str, Any]]:
    base = [run[part] for run in found[ONCE]]
    for way, measured in found.items():
        own = [run[part] for run in measured]
        low, _, high = statistics.quantiles([a / b for a, b in zip(own, base, strict=True)], n=4)
        yield {
            "name": f"{part}, {way}",
            "median": statistics.median(own),
            "ratio": statistics.median(own) / statistics.median(base),
            "spread": [low, high],
            "top1": measured[0]["top1"],
        }
