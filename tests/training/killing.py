"""Runs that kill themselves at a chosen moment, and what a finished run amounts to, bit for bit."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from bnfinetune.training import pauses, run
from bnfinetune.training.data.loaders import EvalLoader, ImageLoader, TrainLoader
from bnfinetune.training.loop import trainer as loop
from bnfinetune.training.measuring import measurer
from bnfinetune.training.measuring.measurer import Measurer
from bnfinetune.training.measuring.metrics import Tally
from bnfinetune.training.run import finetune
from bnfinetune.training.saving import atomic, states, timm_folder

# A run with a state of every kind: averaged weights, dropout, mixup, accumulation, re-estimated statistics.
OPTIONS = {
    "model.name": "test_resnet",
    "model.pretrained": False,
    "model.kwargs": {"drop_rate": 0.2},
    "data.image_size": 32,
    "data.augment.mixup": 0.2,
    "train.epochs": 4,
    "train.grad_accum": 2,
    "train.ema": 0.8,
    "recalibrate.at": ["start", "eval", "end"],
    "checkpoint.every_steps": 2,
    "run.check": "off",
    "run.report": False,
}

# What a run is doing, by the calls that it does it in; all the rest is a step.
PHASES = {
    "evaluation": [(Measurer, "measure")],
    "re-estimation": [(measurer, "recalibrate")],
    "saving": [(owner, "write_folder") for owner in (states, timm_folder)],
    "finish": [(run, name) for name in ("measure_best", "write_report")],
}
# Whose beginnings and ends are the moments at which a run is killed.
MOMENTS = [
    *((loop.Trainer, name) for name in ("_update", "_loss", "_count", "_note", "enter")),
    *((owner, "emit") for owner in (ImageLoader, TrainLoader, EvalLoader)),  # a batch, of training or otherwise
    (Tally, "add"),
    *((os, name) for name in ("fsync", "rename", "replace", "mkdir")),
    (shutil, "rmtree"),
    (torch, "save"),
    *((owner, "save_tensors") for owner in (states, timm_folder)),
    (timm_folder, "save_config_for_hf"),
    (pauses, "append_line"),
]


class Kill(NamedTuple):
    """By SIGKILL, at the n-th moment of a phase, on one rank."""

    phase: str
    number: int
    rank: int = 0


class Moments:
    """Counts the moments of a run by phase, and kills its process at one of them."""

    def __init__(self, kill: Kill | None) -> None:
        self.kill = kill
        self.process = os.getpid()
        self.passed: Counter[str] = Counter()
        self.now: list[str] = []
        for phase, calls in PHASES.items():
            for owner, name in calls:
                setattr(owner, name, self._entered(phase, getattr(owner, name)))
        for owner, name in MOMENTS:
            if name in vars(owner):
                setattr(owner, name, self._watched(getattr(owner, name)))

    def _entered(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def entered(*args: Any, **kwargs: Any) -> Any:
            self.now.append(phase)
            try:
                return call(*args, **kwargs)
            finally:
                self.now.pop()

        return entered

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(arg, io.BytesIO) for arg in args):
                return call(*args, **kwargs)  # torch.save for another rank, by the hundred in one exchange
            self._pass()
            result = call(*args, **kwargs)
            self._pass()
            return result

        return watched

    def _pass(self) -> None:
        if os.getpid() != self.process:  # a loader process
            return
        for phase in self.now or ["step"]:
            if self.kill is not None and self.kill[:2] == (phase, self.passed[phase]):
                os.kill(self.process, signal.SIGKILL)
            self.passed[phase] += 1


def train_until(kill: Kill | None, options: dict[str, Any]) -> None:
    """Train as `options` say, and die at the given moment; of a run that ends, every rank writes down its moments."""
    rank = int(os.environ.get("RANK", "0"))
    watch = Moments(kill if kill is not None and kill.rank == rank else None)
    finetune("full", **options)
    moments_of(options, rank).write_text(json.dumps(watch.passed))


def moments_of(options: dict[str, Any], rank: int = 0) -> Path:
    """Where a run that ends writes down how many moments of every phase a rank had."""
    return options["run.dir"].parent / f"moments-{rank}.json"


_FREE = tuple(f"  {key}:" for key in ("dir", "resume", "keep", "every_steps", "every_minutes"))  # of a recipe


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run left behind and that no clock has a part in, by name."""
    found: dict[str, Any] = {"metrics.jsonl": (folder / "metrics.jsonl").read_text()}
    summary = json.loads((folder / "summary.json").read_text())
    for timed in ("seconds", "data_wait", "time", "images_per_second", "peak_memory_bytes"):
        del summary[timed]
    found["summary.json"] = summary
    found["states"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
    for part in (folder / "best", max((folder / "checkpoints").iterdir())):
        for path in part.iterdir():
            if path.suffix == ".safetensors":
                found[f"{part.name}/{path.name}"] = load_file(str(path))
            elif path.suffix == ".pt":
                found[f"{part.name}/{path.name}"] = torch.load(path, weights_only=True)
                for timed in ("seconds", "waiting"):
                    del found[f"{part.name}/{path.name}"]["progress"][timed]
            elif path.name != atomic.MANIFEST:
                lines = path.read_text().splitlines()
                found[f"{part.name}/{path.name}"] = [line for line in lines if not line.startswith(_FREE)]
    return found


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two outcomes are not bit-identical."""
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{name}/{key} on one side only" for key in one.keys() ^ other.keys()]
        return missing + [
            d for key in one.keys() & other.keys() for d in differences(one[key], other[key], f"{name}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [d for n, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{name}/{n}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [f"{name} has other values"]
    return [] if type(one) is type(other) and one == other else [f"{name} is {one!r} and {other!r}"]
