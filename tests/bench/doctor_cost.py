"""What the doctor costs: a watched step against an unwatched one, and the static check in milliseconds."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import timm
import timm.optim
import torch
from torch.utils.data import DataLoader, TensorDataset

import bnfinetune as bnf
from tests.bench.harness import compare, table


def step_of(name: str, images: torch.Tensor) -> tuple[Callable[[], None], torch.nn.Module, torch.optim.Optimizer]:
    """One training step, and what it trains."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model, optimizer


def watched(name: str, size: int, batch: int, rounds: int) -> str:
    """A step under `watch_bn` against the same step without."""
    images = torch.randn(batch, 3, size, size)
    plain, _, _ = step_of(name, images)
    step, model, optimizer = step_of(name, images)
    with bnf.watch_bn(model, optimizer, rerun=False):
        timings = compare({"unwatched": plain, "watched": step}, baseline="unwatched", rounds=rounds)
    return table(f"{name}, {batch} images of {size}", timings)


def static(rounds: int) -> str:
    """The static check of a whole set-up on resnet50."""
    model = timm.create_model("resnet50")
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    loader = DataLoader(TensorDataset(torch.zeros(129, 1)), batch_size=32, shuffle=True)
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        bnf.check_bn(model, optimizer, loader, steps=1000)
        seconds.append(time.process_time() - start)
    return (
        f"check_bn on resnet50: median {1e3 * statistics.median(seconds):.0f} ms, largest {1e3 * max(seconds):.0f} ms"
    )


def main(arguments: Sequence[str]) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="doctor_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args(arguments).rounds
    torch.set_num_threads(1)
    print(static(rounds))
    for name, size, batch in (("resnet18", 96, 8), ("efficientnet_b0", 96, 8)):
        print(watched(name, size, batch, rounds))
