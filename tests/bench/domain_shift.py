"""What foreign statistics cost under image corruptions, and what each adaptation gives back: docs/domain_shift.md.

The embedded backbone with its own head of 49 classes, whose weights and statistics come from clean printed characters,
reads characters that it has not seen, clean and corrupted. Adaptation never sees a label: AdaBN re-estimates the
statistics from 8, 32, 128 or 512 other images with the same corruption; batch statistics, mixing and TENT work on the
test batches themselves, in batches of 64.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor, nn
from tqdm import tqdm

import bnfinetune.demo
from bnfinetune.bn import BNPolicy, apply_policy
from bnfinetune.bn.adapt import adapt_model
from tests.bench.pages import DOCS, draw_plots, put_table
from tests.bench.results import record

ADABN = (8, 32, 128, 512)
BATCH = 64


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images + 0.25 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _salt_and_pepper(images: Tensor, generator: torch.Generator) -> Tensor:
    hit = torch.rand(images.shape, generator=generator) < 0.15
    return torch.where(hit, torch.rand(images.shape, generator=generator).round(), images)


def _coarse(images: Tensor, generator: torch.Generator) -> Tensor:
    return tvf.resize(tvf.resize(images, [12, 12]), list(images.shape[-2:]))


CORRUPTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": lambda images, _: images,
    "low contrast": lambda images, _: 0.5 + 0.25 * (images - 0.5),
    "brighter": lambda images, _: (0.5 * images + 0.5).clamp(0, 1),
    "darker": lambda images, _: 0.3 * images,
    "inverted": lambda images, _: 1 - images,
    "gaussian noise": _noise,
    "salt and pepper": _salt_and_pepper,
    "blur": lambda images, _: tvf.gaussian_blur(images, [7, 7], [1.5, 1.5]),
    "coarse pixels": _coarse,
}
"""From images (N, 3, H, W) in [0, 1] to such."""


def characters(count: int, test: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images to adapt to, test images (N, 3, 32, 32) in [0, 1], and the labels of the latter, all shuffled."""
    splits = bnfinetune.demo.load_characters(train=count, validation=test, seed=1000 + seed)
    shuffled = {name: split.shuffle(seed=seed) for name, split in splits.items()}
    target, held_out = (
        torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in shuffled[name]["image"]]))
        for name in ("train", "validation")
    )
    labels = torch.tensor(shuffled["validation"]["label"])
    return target.permute(0, 3, 1, 2) / 255, held_out.permute(0, 3, 1, 2) / 255, labels


def accuracy(predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent, predicted in batches of `BATCH`."""
    with torch.inference_mode():
        predicted = torch.cat([predict(part).argmax(1) for part in images.split(BATCH)])
    return 100 * (predicted == labels).float().mean().item()


def ways_of(model: nn.Module, target: Tensor) -> dict[str, Callable[[], nn.Module]]:
    """Every way to predict, each of which makes its own copy of the model."""
    ways: dict[str, Callable[[], nn.Module]] = {
        "source": lambda: model,
        "batch": lambda: apply_policy(copy.deepcopy(model), BNPolicy(eval_stats="batch")),
    }
    for count in ADABN:
        ways[f"AdaBN {count}"] = partial(adapt_model, model, "adabn", target.split(128), num_samples=count, prior=0)
    return {**ways, "mix": partial(adapt_model, model, "mix"), "TENT": partial(adapt_model, model, "tent")}


def measure(images: int, test: int, seed: int) -> dict[str, dict[str, float]]:
    """Top-1 by corruption and way."""
    torch.manual_seed(seed)
    model = timm.create_model("bnf_resnet", pretrained=True).eval()
    config: dict[str, Any] = model.pretrained_cfg
    target, held_out, labels = characters(images, test, seed)
    scores = {}
    for name, corrupt in CORRUPTIONS.items():
        generator = torch.Generator().manual_seed(seed)
        prepared = [
            tvf.normalize(corrupt(part, generator), config["mean"], config["std"]) for part in (target, held_out)
        ]
        ways = ways_of(model, prepared[0])
        scores[name] = {way: accuracy(adapted(), prepared[1], labels) for way, adapted in ways.items()}
    return scores


def summarise(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over seeds, by corruption and way."""
    return {
        name: {
            way: [statistics.mean(run[name][way] for run in runs), statistics.stdev(run[name][way] for run in runs)]
            for way in runs[0][name]
        }
        for name in runs[0]
    }


def table(scores: dict[str, dict[str, list[float]]]) -> str:
    """Markdown, a row per corruption."""
    ways = list(scores["none"])
    lines = ["| corruption | " + " | ".join(ways) + " |", "| --- |" + " ---: |" * len(ways)]
    for name, row in scores.items():
        lines.append(f"| {name} | " + " | ".join(f"{mean:.1f} ± {sd:.1f}" for mean, sd in row.values()) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench domain_shift", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=980, help="test characters")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # 8 images are too few, and that is the point
    runs = [measure(max(ADABN), options.test, seed) for seed in tqdm(range(options.seeds), unit="seed")]
    scores = summarise(runs)
    path = record("domain_shift", "characters", {"seeds": options.seeds, "top1": scores}, ("torch", "timm"))
    what = f"Top-1 in %, {options.test} test characters, {options.seeds} seeds, mean ± standard deviation"
    put_table(DOCS / "domain_shift.md", path, table(scores), what)
    draw_plots()
    print(table(scores))
