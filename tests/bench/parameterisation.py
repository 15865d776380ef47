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

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfinetune.demo  # registers bnf_resnet
from bnfinetune.bn import find_bn_layers, freeze_bn
from bnfinetune.bn.conv_bn import fold_parameters
from bnfinetune.bn.fold import fold_bn
from bnfinetune.bn.fuse import fuse_bn

PARAMETERISATIONS = {"separate": fold_bn, "absorbed": fuse_bn}


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


def steps_of_the_product(model: nn.Module, images: Tensor, labels: Tensor, lr: float) -> None:
    """Prints by what factor one SGD step moves W * s further if W is trained, against s^2."""
    separate, absorbed = fold_bn(copy.deepcopy(model)), fuse_bn(copy.deepcopy(model))
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
    low, mid, high = torch.cat(factors).quantile(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist()
    print(f"one SGD step moves W * s by s^2 times as much if W is trained: largest deviation {max(errors):.1e};")
    print(f"s^2 over the channels of bnf_resnet: {low:.3g} to {high:.3g}, median {mid:.3g}\n")


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
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    images, labels = digits("train")
    steps_of_the_product(starting_point(0), images, labels, lr=1e-3)
    print("| weight decay | learning rate | separate | absorbed |\n| --- | --- | --- | --- |")
    for decay in options.decays:
        for lr in options.lrs:
            cells = []
            for name in PARAMETERISATIONS:
                found = [accuracy(name, lr, decay, seed, options.epochs) for seed in range(options.seeds)]
                cells.append(f"{statistics.mean(found):.1f} ({min(found):.1f}-{max(found):.1f})")
            print(f"| {decay:g} | {lr:g} | {cells[0]} | {cells[1]} |", flush=True)
