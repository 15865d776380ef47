"""A training step under each policy against the native layers that the policy replaces.

`batch` and the rules without a native counterpart are measured against native BN in training mode, the frozen ones
against native BN in evaluation mode, which `model.train()` would undo.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import timm
import torch
from torch import nn

from bnfinetune.bn import BNPolicy, apply_policy, find_bn_layers
from tests.bench.harness import Timing, compare, step_device, table
from tests.bench.pages import DOCS, put_table
from tests.bench.results import record, recorded

LIVE = {
    "batch": BNPolicy(train_stats="batch"),
    "cumulative": BNPolicy(update_stats="cumulative"),
    "no update": BNPolicy(update_stats="none"),
    "running, ema": BNPolicy(train_stats="running"),
    "sync, one process": BNPolicy(train_stats="sync"),
    "ghost of 8": BNPolicy(train_stats="ghost", ghost_size=8),
    "renorm": BNPolicy(train_stats="renorm"),
    "stochastic": BNPolicy(train_stats="stochastic"),
}
FROZEN = {
    "frozen statistics": BNPolicy(train_stats="running", update_stats="none"),
    "frozen, affine too": BNPolicy(train_stats="running", update_stats="none", affine="frozen"),
}


def step_of(model: nn.Module, images: torch.Tensor, *, bn_eval: bool = False) -> Callable[[], None]:
    """One training step: forward, backward and update."""
    model = copy.deepcopy(model).train()
    for layer in find_bn_layers(model).values() if bn_eval else ():
        layer.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def figures(timings: list[Timing]) -> dict[str, list[float]]:
    """Ratio and the middle half of the rounds' ratios, by policy."""
    return {timing.name: [timing.ratio, *timing.spread] for timing in timings}


def page_table() -> str:
    """All models recorded so far side by side, in Markdown."""
    models = recorded("policy_overhead")
    labels = dict.fromkeys(label for entry in models.values() for label in entry["ratios"])
    lines = ["| policy | " + " | ".join(models) + " |", "| --- |" + " ---: |" * len(models)]
    for label in labels:
        cells = [entry["ratios"].get(label) for entry in models.values()]
        shown = [f"{cell[0]:.3f} ({cell[1]:.3f} to {cell[2]:.3f})" if cell else "" for cell in cells]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench policy_overhead", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "efficientnet_b0"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", help="some policies instead of all")
    options = parser.parse_args(arguments)
    device = step_device()
    for name in options.models:
        model = timm.create_model(name, num_classes=10).to(device)
        images = torch.randn(options.batch, 3, options.size, options.size, device=device)
        ratios: dict[str, list[float]] = {}
        where = f"{name}, batch {options.batch} of {options.size}x{options.size} on {device}, {options.rounds} rounds"
        for baseline, policies, bn_eval in (("native train", LIVE, False), ("native eval", FROZEN, True)):
            chosen = {label: policy for label, policy in policies.items() if label in (options.only or policies)}
            if not chosen:
                continue
            steps = {baseline: step_of(model, images, bn_eval=bn_eval)}
            for label, policy in chosen.items():
                steps[label] = step_of(apply_policy(copy.deepcopy(model), policy), images)
            timings = compare(steps, baseline=baseline, rounds=options.rounds)
            ratios |= figures(timings)
            print(table(where, timings), flush=True)
        setting = {"batch": options.batch, "size": options.size, "rounds": options.rounds}
        path = record("policy_overhead", name, {**setting, "ratios": ratios}, ("torch", "timm"))
    what = (
        f"Ratios of medians over {options.rounds} alternating rounds, in brackets the middle half of the rounds' "
        f"ratios; batch {options.batch}, {options.size} px"
    )
    put_table(DOCS / "policies.md", path, page_table(), what)
