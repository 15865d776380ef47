"""What batches are made of, and what that does to BN: classes and domains apart or mixed, for docs/pitfalls.md.

The embedded backbone is fine-tuned on the 200 labelled digits, without augmentation, in batches of 20. First the
batches hold images of 1, 2, 5 or all 10 classes, as sorted files give them; then images of one of two domains, the
digits as they are and the same darkened, or of both. The same weights read the 1,200 test images three times: as
training normalises, by test batches made up like the training batches; by the running averages; and by statistics
computed anew from the training images (precise-BN), of all of them together or, of domains, of each on its own.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import bnfinetune as bnf
from tests.bench.pages import draw_plots
from tests.bench.results import record
from tests.bench.running_averages import accuracy, digits

SIZE = 20
CLASSES = (1, 2, 5, 10)
DOMAINS = ("plain", "darkened")

Set = tuple[Tensor, Tensor]
"""Images (N, 3, 32, 32) as the backbone takes them, and labels (N,)."""


@dataclass(frozen=True)
class Batch:
    """Rows of a set that are seen together, and whose domain's statistics they are normalised by, if these differ."""

    rows: Tensor
    domain: str | None = None


def batches_by_kind(kinds: Tensor, together: int) -> list[Batch]:
    """Rows in a random order, `SIZE` in a batch, each batch of at most so many kinds.

    Remainders of less than half a batch are left out.

    Args:
        kinds: (N,) class or domain of every row, from 0.
        together: kinds that share batches.
    """
    batches = []
    for group in torch.randperm(int(kinds.max()) + 1).split(together):
        rows = torch.isin(kinds, group).nonzero().flatten()
        batches += [Batch(part) for part in rows[torch.randperm(len(rows))].split(SIZE) if len(part) >= SIZE / 2]
    return [batches[number] for number in torch.randperm(len(batches))]


def tune(model: nn.Module, data: Set, epochs: int, batches_of: Callable[[], list[Batch]]) -> nn.Module:
    """All weights that the model's policies let learn, with AdamW, on batches drawn anew for each epoch."""
    images, labels = data
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(epochs):
        for batch in batches_of():
            with bnf.domain(model, batch.domain) if batch.domain else nullcontext():
                loss = F.cross_entropy(model(images[batch.rows]), labels[batch.rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def as_in_training(model: nn.Module, data: Set, batches: list[Batch]) -> float:
    """Top-1 in percent with each batch normalised by its own statistics."""
    live = bnf.apply_policy(copy.deepcopy(model), bnf.BNPolicy(eval_stats="batch"))
    hits = sum(len(batch.rows) * accuracy(live, data[0][batch.rows], data[1][batch.rows]) for batch in batches)
    return hits / sum(len(batch.rows) for batch in batches)


def anew(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy with the statistics of these images."""
    exact = bnf.unfreeze_bn(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are few, and all there are
        bnf.precise_bn(exact, images[torch.randperm(len(images))].split(100))
    return exact


def backbone(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("bnf_resnet", pretrained=True, num_classes=10)


def measure_classes(together: int, seed: int, train: Set, test: Set) -> dict[str, float]:
    """Top-1 in percent by what normalises, after training on batches of so many classes."""
    batches = partial(batches_by_kind, train[1], together)
    live = tune(backbone(seed), train, 10, batches)
    frozen = tune(bnf.freeze_bn(backbone(seed)), train, 10, batches)
    return {
        "as in training": as_in_training(live, test, batches_by_kind(test[1], together)),
        "running averages": accuracy(live, *test),
        "precise-BN": accuracy(anew(live, train[0]), *test),
        "frozen": accuracy(frozen, *test),
    }


def both_domains(data: Set) -> tuple[Set, Tensor]:
    """The digits as they are and then the same darkened, and the domain (N,) of each."""
    images, labels = data
    config: dict[str, Any] = timm.get_pretrained_cfg("bnf_resnet").to_dict()
    black = -torch.tensor(config["mean"]).div(torch.tensor(config["std"])).view(3, 1, 1)
    domains = torch.arange(2).repeat_interleave(len(images))
    return (torch.cat([images, black + 0.3 * (images - black)]), labels.repeat(2)), domains


def of_one_domain(domains: Tensor) -> list[Batch]:
    """Batches of one domain each, which say whose."""
    return [Batch(batch.rows, DOMAINS[int(domains[batch.rows[0]])]) for batch in batches_by_kind(domains, 1)]


def measure_domains(seed: int, train: Set, test: Set) -> Iterator[tuple[str, dict[str, float]]]:
    """Top-1 in percent over both domains by what normalises, for each way to mix them and to normalise."""
    (trained, domains), (tested, test_domains) = both_domains(train), both_domains(test)

    def read(model: nn.Module, together: int) -> dict[str, float]:
        parts = [tuple(tensor[test_domains == number] for tensor in tested) for number in range(len(DOMAINS))]
        own = [accuracy(anew(model, trained[0][domains == number]), *part) for number, part in enumerate(parts)]
        return {
            "as in training": as_in_training(model, tested, batches_by_kind(test_domains, together)),
            "running averages": accuracy(model, *tested),
            "precise-BN": accuracy(anew(model, trained[0]), *tested),
            "precise-BN of each domain": sum(own) / len(own),
        }

    yield "both in a batch", read(tune(backbone(seed), trained, 5, partial(batches_by_kind, domains, 2)), 2)
    yield "one in a batch", read(tune(backbone(seed), trained, 5, partial(batches_by_kind, domains, 1)), 1)
    own = bnf.apply_policy(backbone(seed), bnf.BNPolicy(domains=DOMAINS))
    tune(own, trained, 5, partial(of_one_domain, domains))
    yield "one in a batch, statistics of its own", {"running averages": _by_domain(own, tested, test_domains)}
    frozen = tune(bnf.freeze_bn(backbone(seed)), trained, 5, partial(batches_by_kind, domains, 2))
    yield "frozen", {"running averages": accuracy(frozen, *tested)}


def _by_domain(model: nn.Module, data: Set, domains: Tensor) -> float:
    scores = []
    for number, name in enumerate(DOMAINS):
        with bnf.domain(model, name):
            scores.append(accuracy(model, data[0][domains == number], data[1][domains == number]))
    return sum(scores) / len(scores)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench batch_mix", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    train, test = digits("train"), digits("test")
    classes: dict[str, dict[str, list[float]]] = {}
    domains: dict[str, dict[str, list[float]]] = {}
    for seed in tqdm(range(options.seeds), unit="seed"):
        for together in CLASSES:
            _add(classes, str(together), measure_classes(together, seed, train, test))
        for way, scores in measure_domains(seed, train, test):
            _add(domains, way, scores)
    record("batch_mix", "classes in a batch", {"top1": classes}, ("torch", "timm"))
    record("batch_mix", "domains in a batch", {"top1": domains}, ("torch", "timm"))
    draw_plots()
    for name, rows in {**classes, **domains}.items():
        print(name, {what: [round(value, 1) for value in values] for what, values in rows.items()})


def _add(table: dict[str, dict[str, list[float]]], row: str, scores: dict[str, float]) -> None:
    for what, score in scores.items():
        table.setdefault(row, {}).setdefault(what, []).append(round(score, 2))
