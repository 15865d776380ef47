"""Judge the recommendations by running the candidates on the embedded data: writes docs/checks/recommendations.md.

Run: python -m tests.diagnose.judge_recommendations [SEED ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

import bnfinetune as bnf
from bnfinetune.demo import load_digits
from bnfinetune.diagnose.drift import inspect_bn
from bnfinetune.diagnose.recommend import Recommendation, Situation, recommend

PAGE = Path(__file__).parents[2] / "docs" / "checks" / "recommendations.md"

CANDIDATES = ("full", "freeze_stats", "precise_then_freeze", "bn_only")
EPOCHS = 8

SITUATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny batch, matched statistics": ("matched", {"train.batch_size": 2}),
    "tiny batch, pretrained statistics": ("pretrained", {"train.batch_size": 2}),
    "tiny batch, large shift": ("shifted", {"train.batch_size": 2}),
    "small batch, untrained statistics": ("untrained", {"train.batch_size": 4}),
    "small batch, matched statistics": ("matched", {"train.batch_size": 4}),
    "large batch, pretrained statistics": ("pretrained", {"train.batch_size": 32}),
    "large batch, large shift": ("shifted", {"train.batch_size": 32}),
    "tiny set, pretrained statistics": ("pretrained", {"train.batch_size": 8, "data.train_samples": 50}),
    "tiny set, large shift": ("shifted", {"train.batch_size": 8, "data.train_samples": 50}),
}

_TIE = 0.015  # top-1 of 1,200 test images is known to about one point


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The training digits as the network sees them."""
    split = load_digits()["train"].with_format("torch")
    images = torch.stack([image.float().expand(3, -1, -1) for image in split["image"]]) / 127.5 - 1
    return images, torch.as_tensor(split["label"][:])


def planted(kind: str, images: torch.Tensor) -> nn.Module:
    """The embedded backbone with statistics of a kind."""
    model: nn.Module = timm.create_model("bnf_resnet", pretrained=True)
    if kind == "matched":
        bnf.precise_bn(model, [images])
    for layer in bnf.find_bn_layers(model).values() if kind in ("shifted", "untrained") else ():
        if kind == "untrained":
            layer.reset_running_stats()
        else:
            layer.running_mean += 1.5 * layer.running_var.sqrt()
    return model


def advised(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, overrides: dict[str, Any]) -> Recommendation:
    """What the doctor recommends from a measurement."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    size, count = overrides["train.batch_size"], overrides.get("data.train_samples", len(images))
    chosen = order[:count]
    data = list(zip(images[chosen].split(size), labels[chosen].split(size), strict=True))
    report = inspect_bn(model, data, causes=0, training_images=count)
    return recommend(Situation.of(report))


def measured(recipe: str, weights: Path, overrides: dict[str, Any], seeds: list[int], scratch: Path) -> float:
    """Mean test accuracy of a candidate."""
    scores = []
    for seed in seeds:
        settings = {
            "model.checkpoint": str(weights),
            "run.seed": seed,
            "run.dir": tempfile.mkdtemp(dir=scratch),
            "train.epochs": EPOCHS,
            "evaluate.every_epochs": EPOCHS,
        }
        scores.append(bnf.finetune(recipe, **(settings | overrides)).after["test"].top1)
    return sum(scores) / len(scores)


def row(name: str, seeds: list[int], scratch: Path) -> str:
    """One line of the table."""
    kind, overrides = SITUATIONS[name]
    images, labels = digits()
    model = planted(kind, images)
    advice = advised(model, images, labels, overrides)
    weights = scratch / f"{kind}.safetensors"
    save_file(model.state_dict(), str(weights))
    scores = {recipe: measured(recipe, weights, overrides, seeds, scratch) for recipe in CANDIDATES}
    advised_score, shown = scores[advice.recipe], f"`{advice.recipe}`"
    if "recalibrate.at=[start]" in advice.overrides:
        anew = overrides | {"recalibrate.at": ["start"]}
        advised_score = measured(advice.recipe, weights, anew, seeds, scratch)
        shown += " `recalibrate.at=[start]`"
    right = "yes" if max(scores.values()) - advised_score <= _TIE else "no"
    cells = " | ".join(f"{scores[recipe]:.1%}" for recipe in CANDIDATES)
    return f"| {name} | {shown} | {advised_score:.1%} | {right} | {cells} |"


def main(seeds: list[int]) -> None:
    lines = [
        "# Recommendations, judged",
        "",
        "<!-- Written by python -m tests.diagnose.judge_recommendations. -->",
        "",
        "Test accuracy on the embedded digits in planted situations, and what `inspect` recommends from measurements.",
        f"200 training images or as said, {EPOCHS} epochs, seeds {seeds}. Right: at most 1.5 points below the best,",
        "which is about what 1,200 test images can tell apart.",
        "",
        f"| situation | recommended | accuracy | right | {' | '.join(f'`{name}`' for name in CANDIDATES)} |",
        "| --- | --- | ---: | --- |" + " ---: |" * len(CANDIDATES),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for name in SITUATIONS:
            lines.append(row(name, seeds, Path(scratch)))
            print(lines[-1], flush=True)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0])
