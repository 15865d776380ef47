"""From which size of images on channels_last saves time on a CPU: behind `auto` of `model.channels_last`.

    python -m tests.bench memory_format [--models ...] [--record]

A training step with AdamW and a forward in evaluation mode, each in both memory formats, in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.harness import lead, run_in_turn, step_device
from tests.bench.results import record

MODELS = (
    *("resnet18", "resnet50", "mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0", "tf_efficientnet_lite0"),
    *("regnety_002", "densenet121", "vgg11_bn"),
)
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
BATCH = 8


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench memory_format", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 96, 128, 224])
    parser.add_argument("--rounds", type=int, default=6, help="six or more give an interval")
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/benchmarks.md")
    options = parser.parse_args(arguments)
    device = step_device()
    for name in options.models:
        rows = [measure(name, size, options.rounds, device) for size in options.sizes]
        if options.record:
            record("memory_format", f"{name}, batches of {BATCH}", {"rows": rows, "rounds": options.rounds})


def measure(name: str, size: int, rounds: int, device: torch.device) -> dict[str, object]:
    """The time of channels_last over that of the plain format, with a 95 % interval, of a step and of a forward."""
    row: dict[str, object] = {"name": f"{size} px"}
    for what, build in (("step", _step), ("forward", _forward)):
        runs = {title: build(name, size, memory_format, device) for title, memory_format in FORMATS.items()}
        found = lead(run_in_turn(runs, rounds=rounds, warmup=1), "NHWC", "NCHW")
        row[what] = [round(value, 3) for value in (found.ratio, found.low, found.high)]
    print(f"{name}, {size} px: {row}", flush=True)
    return row


def _network(name: str, size: int, memory_format: torch.memory_format, device: torch.device) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(device, memory_format=memory_format)
    return model, torch.randn(BATCH, 3, size, size, device=device).contiguous(memory_format=memory_format)


def _step(name: str, size: int, memory_format: torch.memory_format, device: torch.device) -> Callable[[], object]:
    model, images = _network(name, size, memory_format, device)
    labels = torch.arange(BATCH, device=device) % 10
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _forward(name: str, size: int, memory_format: torch.memory_format, device: torch.device) -> Callable[[], object]:
    model, images = _network(name, size, memory_format, device)
    return torch.no_grad()(lambda: model.eval()(images))
