"""One job of BN changed at a time, and ways out of its pitfalls, by batch size: for docs/pitfalls.md.

The embedded backbone is fine-tuned on the 200 labelled digits for 5 epochs of AdamW, without augmentation, with a
constant learning rate that follows the batch by its square root (1e-3 at 8), and measured once on the 1,200 test
images. All ways of a seed start from the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import bnfinetune as bnf
from tests.bench.pages import draw_plots
from tests.bench.results import record
from tests.bench.running_averages import accuracy, digits

EPOCHS = 5
BATCHES = (2, 16)

Set = tuple[Tensor, Tensor]
"""Images (N, 3, 32, 32) as the backbone takes them, and labels (N,)."""


def _as_it_is(model: nn.Module, images: Tensor) -> nn.Module:
    return model


def _policy(**switches: str) -> Callable[[nn.Module, Tensor], nn.Module]:
    return lambda model, images: bnf.apply_policy(model, bnf.BNPolicy(**switches))


def _affine_only(model: nn.Module, images: Tensor) -> nn.Module:
    affine = {p for layer in bnf.find_bn_layers(model).values() for p in (layer.weight, layer.bias)}
    head = set(model.get_classifier().parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in affine | head)
    return bnf.freeze_bn(model, affine=False)


def _precise(model: nn.Module, images: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the images are few, and all there are
        bnf.precise_bn(model, images.split(100))
    return model


def _precise_then_freeze(model: nn.Module, images: Tensor) -> nn.Module:
    return bnf.freeze_bn(_precise(model, images))


def _renorm(model: nn.Module, images: Tensor) -> nn.Module:
    policy = bnf.BNPolicy(train_stats="renorm", update_stats="ema", renorm_rmax=3.0, renorm_dmax=5.0)
    return bnf.apply_policy(model, policy)


def _group_norm(model: nn.Module, images: Tensor) -> nn.Module:
    return bnf.convert_group_norm(model, [images], on_report=lambda report: None)


@dataclass(frozen=True)
class Way:
    """What is done to a network before training, and after four fifths of it."""

    before: Callable[[nn.Module, Tensor], nn.Module] = _as_it_is
    late: Callable[[nn.Module, Tensor], nn.Module] = _as_it_is


PLAIN, RE_ESTIMATED = "plain BN", "plain BN, precise-BN at the end"
WAYS = {
    PLAIN: Way(),
    "affine frozen": Way(_policy(affine="frozen")),
    "running statistics normalise": Way(_policy(train_stats="running", update_stats="ema")),
    "statistics fixed": Way(_policy(train_stats="running", update_stats="none")),
    "statistics and affine fixed": Way(lambda model, images: bnf.freeze_bn(model)),
    "affine and head alone learn": Way(_affine_only),
    "fixed for the last fifth": Way(late=_precise_then_freeze),
    "precise-BN, then fixed": Way(_precise_then_freeze),
    "batch renorm": Way(_renorm),
    "StochNorm": Way(_policy(train_stats="stochastic", update_stats="ema")),
    "GroupNorm": Way(_group_norm),
}


def tune(way: Way, batch: int, seed: int, train: Set) -> nn.Module:
    """The trained network, in evaluation mode."""
    images, labels = train
    torch.manual_seed(seed)
    model = way.before(timm.create_model("bnf_resnet", pretrained=True, num_classes=10), images).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3 * (batch / 8) ** 0.5)
    draw = torch.Generator().manual_seed(seed)
    parts = [part for _ in range(EPOCHS) for part in torch.randperm(len(images), generator=draw).split(batch)]
    parts = [part for part in parts if len(part) > 1]
    for number, part in enumerate(parts):
        if number == len(parts) * 4 // 5:
            model = way.late(model, images)
        F.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench switches", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    train, test = digits("train"), digits("test")
    for batch in options.batches:
        found: dict[str, list[float]] = {}
        for seed, (name, way) in tqdm(list(product(range(options.seeds), WAYS.items())), unit="run"):
            model = tune(way, batch, seed, train)
            found.setdefault(name, []).append(round(accuracy(model, *test), 2))
            if name == PLAIN:
                found.setdefault(RE_ESTIMATED, []).append(round(accuracy(_precise(model, train[0]), *test), 2))
        record("switches", f"digits, batches of {batch}", {"top1": found}, ("torch", "timm"))
        for name, scores in found.items():
            print(f"{name:34}", [round(score, 1) for score in scores])
    draw_plots()
