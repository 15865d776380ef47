"""What running averages get wrong while a network is fine-tuned, and what that costs: docs/running_averages.md.

The embedded backbone is fine-tuned on the 200 labelled digits, without augmentation. Afterwards its running statistics
are compared with those of all 200 images under the final weights (precise-BN), and both are tried on the 1,200 test
images. One thing is varied at a time: momentum, number of updates, batch size (with equally many images in all).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import bnfinetune.demo
from bnfinetune.bn import BNPolicy, apply_policy, find_bn_layers
from bnfinetune.bn.statistics.precise import precise_bn
from tests.bench.pages import DOCS, draw_plots, put_table
from tests.bench.results import record

IMAGES = 2000
"""Images seen by each run of the batch-size sweep."""


@dataclass(frozen=True)
class Setting:
    """One fine-tuning run, and which of its values is varied."""

    sweep: str
    batch: int = 32
    updates: int = 60
    momentum: float = 0.1

    @property
    def value(self) -> str:
        """What is varied, as a row of the table shows it."""
        return f"{getattr(self, self.sweep.split(',')[0]):g}"


SETTINGS = [
    *(Setting("momentum", momentum=momentum) for momentum in (0.001, 0.01, 0.1, 0.3, 1.0)),
    *(Setting("updates", updates=updates) for updates in (2, 5, 10, 30, 100)),
    *(Setting("updates, momentum 0.01", updates=updates, momentum=0.01) for updates in (2, 5, 10, 30, 100)),
    *(Setting("batch", batch=batch, updates=IMAGES // batch) for batch in (2, 4, 8, 16, 32, 100)),
]


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) as the backbone takes them, and labels (N,)."""
    rows = bnfinetune.demo.load_digits()[split]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    config: dict[str, Any] = timm.get_pretrained_cfg("bnf_resnet").to_dict()
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std, torch.tensor(rows["label"])


def tune(setting: Setting, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Fine-tune all weights with AdamW, each batch drawn from a fresh order of the images."""
    torch.manual_seed(seed)
    model = timm.create_model("bnf_resnet", pretrained=True, num_classes=10)
    apply_policy(model, BNPolicy(momentum=setting.momentum)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order: list[int] = []
    for _ in range(setting.updates):
        if len(order) < setting.batch:
            order = torch.randperm(len(images)).tolist()
        chosen, order = order[: setting.batch], order[setting.batch :]
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def statistics_error(model: nn.Module, exact: nn.Module) -> tuple[float, float]:
    """Root mean square over all channels: of means, in exact standard deviations, and of log variances."""
    means, variances = [], []
    for ours, true in zip(find_bn_layers(model).values(), find_bn_layers(exact).values(), strict=True):
        scale = true.running_var + true.eps
        means.append((ours.running_mean - true.running_mean) / scale.sqrt())
        variances.append(((ours.running_var + true.eps) / scale).log())
    return torch.cat(means).square().mean().sqrt().item(), torch.cat(variances).square().mean().sqrt().item()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def measure(setting: Setting, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> list[float]:
    """Error of means, error of log variances, top-1 with running averages, top-1 with precise statistics."""
    model = tune(setting, *train, seed)
    exact = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the 200 images are all there are
        precise_bn(exact, train[0].split(100))
    return [*statistics_error(model, exact), accuracy(model, *test), accuracy(exact, *test)]


def rows_of(results: dict[Setting, list[list[float]]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each measure of each setting."""
    names = ("mean_error", "variance_error", "top1", "top1_precise")
    rows = []
    for setting, runs in results.items():
        columns = dict(zip(names, zip(*runs, strict=True), strict=True))
        summary = {name: [statistics.mean(v), statistics.stdev(v)] for name, v in columns.items()}
        rows.append({"sweep": setting.sweep, "value": setting.value, "updates": setting.updates, **summary})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row per setting."""
    lines = [
        "| varied | value | error of means [std] | error of log variances | top-1, running averages | precise-BN |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        errors = " | ".join(f"{row[key][0]:.3f}" for key in ("mean_error", "variance_error"))
        scores = " | ".join(f"{row[key][0]:.1f} ± {row[key][1]:.1f}" for key in ("top1", "top1_precise"))
        lines.append(f"| {row['sweep']} | {row['value']} | {errors} | {scores} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench running_averages", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    train, test = digits("train"), digits("test")
    results: dict[Setting, list[list[float]]] = {setting: [] for setting in SETTINGS}
    for setting in tqdm(SETTINGS, unit="setting"):
        results[setting] = [measure(setting, seed, train, test) for seed in range(options.seeds)]
    rows = rows_of(results)
    path = record("running_averages", "digits", {"seeds": options.seeds, "rows": rows}, ("torch", "timm"))
    put_table(DOCS / "running_averages.md", path, table(rows), f"{options.seeds} seeds, mean ± standard deviation")
    draw_plots()
    print(table(rows))
