"""Judge the recommendations by running the candidates on the embedded data: writes docs/checks/recommendations.md.

Run: python -m tests.diagnose.judge_recommendations [--seed N] [SITUATION ...]

Every call adds what it measured to docs/checks/recommendations.json, from which the page is written anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from safetensors.torch import save_file
from torch import nn

import bnfinetune as bnf
import bnfinetune.training.run as run_module
from bnfinetune.demo import load_digits
from bnfinetune.diagnose.drift import inspect_bn
from bnfinetune.diagnose.recommend import Recommendation, Situation, recommend
from bnfinetune.training.data.sampling import Pick, TrainSampler

PAGE = Path(__file__).parents[2] / "docs" / "checks" / "recommendations.md"
RECORDS = PAGE.with_suffix(".json")

CANDIDATES = ("full", "freeze_stats", "precise_then_freeze", "bn_only")
ANEW = "recalibrate.at=[start]"
EPOCHS = 8

SORTED = "sorted"
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
    "sorted by class, matched statistics": ("matched", {"train.batch_size": 32, SORTED: True}),
    "sorted by class, large shift": ("shifted", {"train.batch_size": 32, SORTED: True}),
}

TIE = 0.015
"""Accuracies of 1,200 test images are known to about one point each, more between seeds."""


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


def advised(model: nn.Module, options: dict[str, Any]) -> Recommendation:
    """What the doctor recommends from a measurement."""
    images, labels = digits()
    size, count = options["train.batch_size"], options.get("data.train_samples", len(images))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    if options.get(SORTED):
        order = order[labels[order].argsort(stable=True)]
    data = list(zip(images[order].split(size), labels[order].split(size), strict=True))
    report = inspect_bn(model, data, causes=0, training_images=count)
    return recommend(Situation.of(report))


class SortedSampler(TrainSampler):
    """One class after the other, in every epoch."""

    labels: torch.Tensor

    def __iter__(self) -> Iterator[list[Pick]]:
        order = self.labels.argsort(stable=True)
        for begin, end in self.batches[self.start :]:
            yield [Pick(self.epoch, number) for number in order[begin:end].tolist()]


@contextmanager
def sorted_by_class() -> Iterator[None]:
    """Runs within this context read their training images sorted by class."""
    build = run_module.recipe_loaders

    def loaders_in_order(*args: Any) -> Any:
        loaders = build(*args)
        sampler: Any = loaders.train.batch_sampler
        sampler.__class__, sampler.labels = SortedSampler, torch.as_tensor(loaders.train.dataset.labels)
        return loaders

    with mock.patch.object(run_module, "recipe_loaders", loaders_in_order):
        yield


def accuracy(recipe: str, weights: Path, options: dict[str, Any], seed: int, scratch: Path) -> float:
    """Test accuracy of a candidate."""
    settings = {
        "model.checkpoint": str(weights),
        "run.seed": seed,
        "run.dir": tempfile.mkdtemp(dir=scratch),
        "run.report": False,
        "train.epochs": EPOCHS,
        "evaluate.every_epochs": EPOCHS,
    }
    order = sorted_by_class() if options.get(SORTED) else nullcontext()
    with order:
        keys = {key: value for key, value in options.items() if key != SORTED}
        return bnf.finetune(recipe, **(settings | keys)).after["test"].top1


def judged(name: str, seed: int, scratch: Path) -> dict[str, Any]:
    """What is recommended in a situation, and how the candidates do."""
    kind, options = SITUATIONS[name]
    model = planted(kind, digits()[0])
    advice = advised(model, options)
    weights = scratch / f"{kind}.safetensors"
    save_file(model.state_dict(), str(weights))
    scores = {recipe: accuracy(recipe, weights, options, seed, scratch) for recipe in CANDIDATES}
    recommended = advice.recipe
    if ANEW in advice.overrides:
        recommended += f" {ANEW}"
        anew = options | {"recalibrate.at": ["start"]}
        scores[recommended] = accuracy(advice.recipe, weights, anew, seed, scratch)
    return {"recommended": recommended, "seed": seed, "scores": scores}


def row(name: str, records: list[dict[str, Any]]) -> str:
    """One line of the table: means over seeds."""
    recommended = records[0]["recommended"]
    means = {key: statistics.mean(record["scores"][key] for record in records) for key in records[0]["scores"]}
    lead = means[recommended] - max(score for recipe, score in means.items() if recipe != recommended)
    verdict = "**no**" if lead < -TIE else "tie" if lead <= TIE else "best"
    verdict += f", {100 * lead:+.1f}"
    shown = " ".join(f"`{word}`" for word in recommended.split())
    cells = " | ".join(f"{means[recipe]:.1%}" for recipe in CANDIDATES)
    seeds = ", ".join(str(record["seed"]) for record in records)
    return f"| {name} | {shown} | {means[recommended]:.1%} | {verdict} | {cells} | {seeds} |"


def page(records: dict[str, list[dict[str, Any]]]) -> str:
    """The page, from all that was measured."""
    rows = [row(name, records[name]) for name in SITUATIONS if name in records]
    right = sum("**no**" not in line for line in rows)
    ties = sum("| tie" in line for line in rows)
    lines = [
        "# Recommendations, judged",
        "",
        "<!-- Written by python -m tests.diagnose.judge_recommendations. -->",
        "",
        "Test accuracy on the embedded digits in planted situations, and what `inspect_bn` and `recommend` advise from",
        f"measurements. 200 training images or as said, {EPOCHS} epochs, means over the seeds of the last column.",
        f"{right} of {len(rows)} recommendations are right, {ties} of them as ties: the lead over the best other one",
        f"is within {100 * TIE:.1f} points of 0, which 1,200 test images and so few seeds cannot tell apart.",
        "",
        "Matched: statistics estimated on these images. Pretrained: those of the characters it was trained on. Large",
        "shift: every running mean moved by 1.5 standard deviations. Sorted by class: training reads one class after",
        "the other, which no recipe does by itself.",
        "",
        f"| situation | recommended | accuracy | right | {' | '.join(f'`{name}`' for name in CANDIDATES)} | seeds |",
        "| --- | --- | ---: | --- |" + " ---: |" * len(CANDIDATES) + " --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="judge_recommendations", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("situations", nargs="*", default=list(SITUATIONS))
    options = parser.parse_args()
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    for name in options.situations:
        with tempfile.TemporaryDirectory() as scratch:
            record = judged(name, options.seed, Path(scratch))
        kept = [
            each
            for each in records.get(name, [])
            if each["seed"] != options.seed and each["recommended"] == record["recommended"]
        ]
        records[name] = sorted([*kept, record], key=lambda each: each["seed"])
        RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(records), encoding="utf-8")
        print(row(name, records[name]), flush=True)


if __name__ == "__main__":
    main()
