"""Fine-tuning behind a frozen BN against fine-tuning the absorbed weights: the same function, another optimisation.

Both start from the same pretrained backbone with frozen statistics and affine. `separate` trains W, the network
computes with W * s; `absorbed` trains the product itself. First the change of W * s by one step of SGD is compared
channel by channel, then both are trained at the same learning rates and weight decays.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfinetune.demo  # registers bnf_resnet
from bnfinetune.bn import find_bn_layers, freeze_bn
from bnfinetune.bn.absorb import absorb_bn
from bnfinetune.bn.folding.arithmetic import fold_parameters
from bnfinetune.bn.folding.fold import fold_bn
from tests.bench.pages import DOCS, draw_plots, put_table
from tests.bench.results import record

PARAMETERISATIONS = {"separate": fold_bn, "absorbed": lambda model: fold_bn(absorb_bn(model))}


@cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) in the backbone's range, and labels."""
    rows = bnfinetune.demo.load_digits()[split]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in rows["image"]])
    return torch.from_numpy(pixels / 127.5 - 1)[:, None].expand(-1, 3, -1, -1).contiguous(), torch.tensor(rows["label"])


def starting_point(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return freeze_bn(timm.create_model("bnf_resnet", pretrained=True, num_classes=10))


def scales(model: nn.Module) -> dict[str, Tensor]:
    """`s = g / sqrt(v + e)` of every BN layer, (C,)."""
    return {name: (bn.weight / (bn.running_var + bn.eps).sqrt()).detach() for name, bn in find_bn_layers(model).items()}


def steps_of_the_product(model: nn.Module, images: Tensor, labels: Tensor, lr: float) -> dict[str, Any]:
    """By what factor one SGD step moves W * s further if W is trained: its largest deviation from s^2, and s^2."""
    separate, absorbed = (make(copy.deepcopy(model)) for make in PARAMETERISATIONS.values())
    separate.double(), absorbed.double()
    convs = {name: bn._fold_convs[0] for name, bn in find_bn_layers(separate).items()}
    names = {conv: name for name, conv in separate.named_modules()}
    twins = {name: absorbed.get_submodule(names[conv]) for name, conv in convs.items()}

    def products() -> dict[str, tuple[Tensor, Tensor]]:
        layers = find_bn_layers(separate)
        return {
            name: (fold_parameters(conv, layers[name])[0].detach().clone(), twins[name].weight.detach().clone())
            for name, conv in convs.items()
        }

    before = products()
    for module in (separate, absorbed):
        F.cross_entropy(module(images.double()), labels).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
    factors, errors = [], []
    for name, after in products().items():
        moved = [(new - old).flatten(1).norm(dim=1) for new, old in zip(after, before[name], strict=True)]
        alive = moved[1] > 0
        squares = scales(separate)[name].square()[alive]
        factors.append(squares)
        errors.append((moved[0][alive] / moved[1][alive] / squares - 1).abs().max())
    quantiles = torch.cat(factors).quantile(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist()
    return {"deviation": float(max(errors)), "squares": quantiles}


def accuracy(name: str, lr: float, decay: float, seed: int, epochs: int) -> float:
    """Trains on the 200 digits and measures on the test split, in percent."""
    model = PARAMETERISATIONS[name](starting_point(seed))
    images, labels = digits("train")
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr, momentum=0.9, weight_decay=decay
    )
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(20):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    images, labels = digits("test")
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean() * 100)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench parameterisation", description=__doc__)
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--decays", nargs="+", type=float, default=[0.0, 1e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--record", action="store_true", help="put the figures into docs/parameterisation.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    step = steps_of_the_product(starting_point(0), *digits("train"), lr=1e-3)
    print(step)
    rows = []
    for decay in options.decays:
        for lr in options.lrs:
            found = {
                name: [accuracy(name, lr, decay, seed, options.epochs) for seed in range(options.seeds)]
                for name in PARAMETERISATIONS
            }
            rows.append({"decay": decay, "lr": lr, **found})
            print(rows[-1], flush=True)
    if options.record:
        path = record("parameterisation", "bnf_resnet on digits", {"step": step, "rows": rows}, ("torch", "timm"))
        what = f"Accuracy on the test split in percent: mean of {options.seeds} seeds, smallest and largest"
        put_table(DOCS / "parameterisation.md", path, _page(step, rows), what)
        draw_plots()


def _page(step: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    low, mid, high = step["squares"]
    lines = [
        f"In one step of SGD from the same point, `W s` moves `s^2` times as far if W is trained: the ratio of the two "
        f"moves deviates from `s^2` by at most {step['deviation']:.0e} of it in any channel of any layer, which is "
        f"float32's rounding of the absorbed weights. In `bnf_resnet`, `s^2` runs from {low:.2g} to {high:.2g}, with "
        f"median {mid:.2g}.\n",
        "| weight decay | learning rate | separate | absorbed |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (f"{statistics.mean(row[n]):.1f} ({min(row[n]):.1f}-{max(row[n]):.1f})" for n in PARAMETERISATIONS)
        lines.append(f"| {row['decay']:g} | {row['lr']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)
