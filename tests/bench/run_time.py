"""Where the time of a whole run goes: import, set-up, waiting for data, steps, evaluation, saving, its page."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import bnfinetune as bnf
from bnfinetune.training import run
from bnfinetune.training.assembly import Assembly
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.measuring.measurer import Measurer
from bnfinetune.training.pauses import Pauses
from tests.bench.folders import write_jpegs
from tests.bench.results import record

TIMED = [
    (Measurer, "measure", "evaluation"),
    (Pauses, "save", "saving"),
    (Assembly, "export", "saving"),
    (run, "write_report", "report"),
    (Trainer, "fit", "fit"),
]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench run_time", description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=["full", "freeze_bn", "linear_probe"])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=96, help="side of the network's input")
    parser.add_argument("--images", type=int, default=320, help="training images; a quarter as many to validate")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/benchmarks.md")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jpegs(folder / "images", train=options.images // 4, val=options.images // 16, size=320)
        for recipe in options.recipes:
            settings = {
                "model.name": options.model,
                "model.pretrained": False,
                "data.source": str(folder / "images"),
                "data.image_size": options.size,
                "train.epochs": options.epochs,
                "train.batch_size": 32,
                "run.dir": str(folder / recipe),
            }
            rows.append({"name": recipe, **split(recipe, settings)})
    what = (
        f"Seconds: {options.model} at {options.size} px, {options.images} JPEGs of 320 x 240, {options.epochs} epochs"
    )
    print(what, *rows, sep="\n")
    if options.record:
        record("run_time", what, {"rows": rows})


def split(recipe: str, settings: dict[str, Any]) -> dict[str, float]:
    """Seconds of one run by what they went into; what is timed within something else counts only there."""
    spent: dict[str, float] = defaultdict(float)
    trainers: list[Trainer] = []
    spent["import"] = importing()
    with ExitStack() as stack:
        for owner, method, part in TIMED:
            stack.enter_context(timed(owner, method, spent, part, trainers if method == "fit" else None))
        begin = time.perf_counter()
        bnf.finetune(recipe, **settings)
        total = time.perf_counter() - begin
    progress = trainers[0].progress
    spent["waiting for data"], spent["steps"] = progress.waiting, progress.seconds
    del spent["fit"]
    spent["set-up"] = total - (sum(spent.values()) - spent["import"])
    spent["all"] = total + spent["import"]
    return {key: round(value, 3) for key, value in spent.items()}


def importing() -> float:
    """Seconds that a fresh interpreter takes to import what a run needs, beyond its own start."""
    seconds = []
    for code in ("pass", "import bnfinetune.training.run"):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        seconds.append(time.perf_counter() - begin)
    return seconds[1] - seconds[0]


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float], part: str, seen: list[Any] | None) -> Iterator[None]:
    """Within this context the calls of a method are timed, and the instances noted."""
    original: Callable[..., Any] = getattr(owner, name)

    def timing(instance: Any, *args: Any, **kwargs: Any) -> Any:
        if seen is not None:
            seen.append(instance)
        begin = time.perf_counter()
        try:
            return original(instance, *args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - begin

    with mock.patch.object(owner, name, timing):
        yield
