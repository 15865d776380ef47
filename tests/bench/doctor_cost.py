"""What the doctor costs: a watched step against an unwatched one, and the static check in milliseconds."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import timm.optim
import torch
from torch.utils.data import DataLoader, TensorDataset

import bnfinetune as bnf
from tests.bench.harness import Timing, compare, table
from tests.bench.pages import put_table
from tests.bench.results import record, recorded

PAGE = Path(__file__).parents[2] / "docs" / "checks" / "cost.md"


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


def watched(name: str, size: int, batch: int, rounds: int) -> list[Timing]:
    """A step under `watch_bn` against the same step without."""
    images = torch.randn(batch, 3, size, size)
    plain, _, _ = step_of(name, images)
    step, model, optimizer = step_of(name, images)
    with bnf.watch_bn(model, optimizer, rerun=False):
        return compare({"unwatched": plain, "watched": step}, baseline="unwatched", rounds=rounds)


def static(name: str, rounds: int) -> list[float]:
    """Seconds of static checks of a whole set-up."""
    model = timm.create_model(name)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    loader = DataLoader(TensorDataset(torch.zeros(129, 1)), batch_size=32, shuffle=True)
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        bnf.check_bn(model, optimizer, loader, steps=1000)
        seconds.append(time.process_time() - start)
    return seconds


def page_table() -> str:
    """What is recorded, in Markdown."""
    found = recorded("doctor_cost")
    lines = ["| what | cost | middle half of the rounds |", "| --- | ---: | ---: |"]
    for key, entry in found.items():
        low, high = entry["spread"]
        if entry["unit"] == "%":
            lines.append(f"| {key} | {100 * entry['cost']:+.1f}% of a step | {100 * low:+.1f}% to {100 * high:+.1f}% |")
        else:
            lines.append(f"| {key} | {entry['cost']:.3f} s | {low:.3f} s to {high:.3f} s |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the tables, and puts the figures into docs/checks/cost.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench doctor_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args(arguments).rounds
    torch.set_num_threads(1)
    low, middle, high = statistics.quantiles(static("resnet50", rounds), n=4)
    record("doctor_cost", "`check_bn`, resnet50", {"unit": "s", "cost": middle, "spread": [low, high]})
    for name, size, batch in (("resnet18", 96, 8), ("efficientnet_b0", 96, 8)):
        timings = watched(name, size, batch, rounds)
        title = f"`watch_bn`, {name}, {batch} images of {size}"
        print(table(title, timings))
        found = next(timing for timing in timings if timing.name == "watched")
        figures = {"unit": "%", "cost": found.ratio - 1, "spread": [edge - 1 for edge in found.spread]}
        source = record("doctor_cost", title, figures)
    put_table(PAGE, source, page_table(), f"{rounds} rounds in alternation, medians of CPU time")
    print(page_table())
