"""Where the time of a whole run goes, from the command to its exit: what `summary.json` says, beside the clock."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bnfinetune.training.stopwatch import PARTS
from tests.bench.folders import write_jpegs
from tests.bench.results import record


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
                "recipe": recipe,
                "model.name": options.model,
                "model.pretrained": "false",
                "data.source": folder / "images",
                "data.image_size": options.size,
                "train.epochs": options.epochs,
                "train.batch_size": 32,
                "run.dir": folder / recipe,
            }
            rows.append({"name": recipe, **parts(settings)})
    what = (
        f"Seconds: {options.model} at {options.size} px, {options.images} JPEGs of 320 x 240, {options.epochs} epochs"
    )
    print(what, *rows, sep="\n")
    if options.record:
        record("run_time", what, {"rows": rows})


def parts(settings: Mapping[str, object]) -> dict[str, float]:
    """Seconds of one run by what they went into, and from the start of its process to the end."""
    begin = time.perf_counter()
    words = [f"{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-m", "bnfinetune", *words], check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - begin
    summary = json.loads((Path(str(settings["run.dir"])) / "summary.json").read_text(encoding="utf-8"))
    return {PARTS[name]: seconds for name, seconds in summary["time"].items()} | {"all": round(whole, 3)}
