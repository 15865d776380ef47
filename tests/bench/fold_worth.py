"""From which size of batches on folding saves time: behind `WORTHWHILE` in bnfinetune/training/loop/folding.py."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import timm
import torch

from bnfinetune.bn import fold_bn, freeze_bn
from bnfinetune.training.network.shapes import normalised_values
from tests.bench.frozen_bn import eval_mode, step_of
from tests.bench.harness import compare
from tests.bench.results import record
from tests.bn.models import randomise

SETTINGS = ((1, 64), (4, 64), (16, 64), (2, 160), (4, 160), (8, 160), (16, 160))
FOLDED, PLAIN = "folded", "eval mode"
KINDS = {"affine learns": False, "affine frozen": True}
WORK = 250_000  # values that one measured run normalises per layer, in as many steps as it takes


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench fold_worth", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenetv3_large_100"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/benchmarks.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.models:
        rows = [
            measure(name, batch, size, kind, frozen, options.rounds)
            for batch, size in SETTINGS
            for kind, frozen in KINDS.items()
        ]
        if options.record:
            what = f"{name}, a folded step against one with BN in evaluation mode, {options.rounds} rounds"
            record("fold_worth", what, {"rows": rows})


def measure(name: str, batch: int, size: int, kind: str, frozen: bool, rounds: int) -> dict[str, object]:
    """The ratio of folded steps to steps with eval-mode BN, and how many values a layer normalises per step."""
    torch.manual_seed(0)
    model = randomise(timm.create_model(name)).train()
    images = torch.randn(batch, 3, size, size)
    values = batch * normalised_values(model, images.shape[1:])
    plain = eval_mode(copy.deepcopy(model), affine=not frozen)
    folded = fold_bn(freeze_bn(copy.deepcopy(model), affine=frozen), images[:1])
    steps = {PLAIN: step_of(plain, images), FOLDED: step_of(folded, images)}
    repeats = max(1, round(WORK / values))

    def runs(variant: str) -> None:
        for _ in range(repeats):
            steps[variant]()

    timings = compare({variant: lambda v=variant: runs(v) for variant in steps}, baseline=PLAIN, rounds=rounds)  # type: ignore[misc]
    found = next(timing for timing in timings if timing.name == FOLDED)
    low, high = found.spread
    title = f"batch {batch} of {size}x{size}, {kind}"
    print(f"{name}, {title:34} {values:12,.0f} values  {found.ratio:.3f} ({low:.3f}-{high:.3f})", flush=True)
    return {"name": title, "values per layer": f"{values:,.0f}", "ratio": found.ratio, "spread": found.spread}
