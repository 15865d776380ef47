"""What precise-BN costs over a bare forward and beside fvcore and torch, and what its stopping rule saves.

Costs are ratios to a no-grad forward in training mode over the same batches. The stopping rule is measured against
200 batches of 32 on the embedded characters: images read, seconds, and the error actually left, against a pass over all
of them.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import bnfinetune.demo
from bnfinetune.bn import find_bn_layers
from bnfinetune.bn.statistics.fvcore import update_bn_stats
from bnfinetune.bn.statistics.precise import precise_bn
from tests.bench.harness import compare, step_device, table
from tests.bench.pages import DOCS, put_table
from tests.bench.results import record, recorded

PAGE = DOCS / "precise_bn.md"

MODELS = ("resnet18", "resnet50", "efficientnet_b0", "test_resnet")


def passes_of(model: nn.Module, batches: list[Tensor]) -> dict[str, Callable[[], object]]:
    """One pass over the batches in each way, each on a model of its own."""

    def bare(net: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                net(batch)

    def own(run: Callable[[nn.Module], object]) -> Callable[[], object]:
        net = copy.deepcopy(model).train()
        return lambda: run(net)

    passes = {
        "bare forward": own(bare),
        "precise_bn": own(lambda net: precise_bn(net, batches)),
        "update_bn_stats": own(lambda net: update_bn_stats(net, batches, len(batches))),
        "torch's update_bn": own(lambda net: update_bn(batches, net)),
    }
    try:
        from fvcore.nn import update_bn_stats as fvcore_update_bn_stats
    except ImportError:
        return passes
    return {**passes, "fvcore": own(lambda net: fvcore_update_bn_stats(net, batches, len(batches)))}


def worst_error(model: nn.Module, truth: nn.Module) -> tuple[float, float]:
    """Largest error of any channel: of the mean in standard deviations, of the variance relative; both with eps."""
    errors = []
    for ours, true in zip(find_bn_layers(model).values(), find_bn_layers(truth).values(), strict=True):
        scale = true.running_var + true.eps
        errors.append(
            (
                ((ours.running_mean - true.running_mean) / scale.sqrt()).abs().max().item(),
                ((ours.running_var - true.running_var) / scale).abs().max().item(),
            )
        )
    return max(mean for mean, _ in errors), max(var for _, var in errors)


def stopping_rule(tolerances: Sequence[float], images: Tensor, batch: int) -> list[dict[str, Any]]:
    """What each way of stopping reads and leaves: images, seconds, and the estimated and true errors."""
    model = timm.create_model("bnf_resnet", pretrained=True).eval()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = images[order].split(batch)
    truth = copy.deepcopy(model)
    precise_bn(truth, shuffled)
    rows = []
    for label, limit in [
        ("200 batches", {"num_batches": 200}),
        *((f"tolerance {t:g}", {"tolerance": t}) for t in tolerances),
    ]:
        net = copy.deepcopy(model)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # running out of images shows in the table
            report = precise_bn(net, shuffled, **limit)
        seconds = time.perf_counter() - start
        mean, var = worst_error(net, truth)
        rows.append({"stop": label, "images": report.samples, "seconds": seconds, "estimated": report.error})
        rows[-1] |= {"mean": mean, "variance": var}
    return rows


def stopping_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row per way of stopping."""
    lines = ["| stop | images | seconds | estimated error | error of mean left | of variance |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        errors = " | ".join(f"{row[key]:.4f}" for key in ("estimated", "mean", "variance"))
        lines.append(f"| {row['stop']} | {row['images']} | {row['seconds']:.2f} | {errors} |")
    return "\n".join(lines)


def cost_table() -> str:
    """All models measured so far, in Markdown."""
    models = recorded("precise_cost")
    ways = list(dict.fromkeys(way for entry in models.values() for way in list(entry["ratios"])[1:]))
    lines = ["| model | " + " | ".join(f"`{way}`" for way in ways) + " |", "| --- |" + " ---: |" * len(ways)]
    for name, entry in models.items():
        found = [entry["ratios"].get(way) for way in ways]
        cells = ["-" if each is None else "{:.3f} ({:.3f} to {:.3f})".format(*each) for each in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def characters(count: int) -> Tensor:
    """Embedded characters as a backbone takes them, (count, 3, H, W)."""
    import numpy as np

    rows = bnfinetune.demo.load_characters(train=count)["train"]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench precise_cost", description=__doc__)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=16, help="batches in one pass")
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tolerances", nargs="*", type=float, default=[0.04, 0.02, 0.01])
    parser.add_argument("--images", type=int, default=58800, help="embedded characters for the stopping rule")
    options = parser.parse_args(arguments)
    device = step_device()
    for name in options.models:
        model = timm.create_model(name, num_classes=10).to(device)
        shape = (options.batch, 3, options.size, options.size)
        batches = [torch.randn(shape, device=device) for _ in range(options.batches)]
        where = f"{name}, {options.batches} batches of {options.batch} of {options.size}x{options.size} on {device}"
        timings = compare(passes_of(model, batches), baseline="bare forward", rounds=options.rounds, warmup=1)
        print(table(where, timings), flush=True)
        setting = {"batch": options.batch, "batches": options.batches, "size": options.size, "rounds": options.rounds}
        ratios = {timing.name: [timing.ratio, *timing.spread] for timing in timings}
        path = record("precise_cost", name, {**setting, "ratios": ratios}, ("torch", "timm", "fvcore"))
        what = (
            f"Ratios of medians over {options.rounds} alternating rounds, in brackets the middle half of the rounds' "
            f"ratios; {options.batches} batches of {options.batch}, {options.size} px"
        )
        put_table(PAGE, path, cost_table(), what)
    if options.tolerances:
        rows = stopping_rule(options.tolerances, characters(options.images), options.batch)
        path = record("stopping_rule", "bnf_resnet", {"rows": rows}, ("torch", "timm"))
        put_table(PAGE, path, stopping_table(rows), f"{options.images} images in batches of {options.batch}")
        print(stopping_table(rows))
