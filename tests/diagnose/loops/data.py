"""What the loops train: small networks, some of them pretrained, on images that can be told apart."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 4
SIZE = 16

SOURCE, TARGET = 101, 102
"""Seeds of the class means of two tasks."""


def pictures(seed: int, count: int, task: int = TARGET) -> TensorDataset:
    """Images of four classes, sorted by class as in folders: a coarse mean of each class, and noise."""
    means = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(task))
    labels = torch.arange(count) * CLASSES // count
    noise = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(F.interpolate(means, size=SIZE)[labels] * 0.7 + noise, labels)


def loaders(
    seed: int, *, train: int = 128, batch_size: int = 16, shuffle: bool = True, **options: Any
) -> tuple[DataLoader, DataLoader]:
    """A training loader and one for evaluation."""
    order = torch.Generator().manual_seed(seed)
    return (
        DataLoader(pictures(seed, train), batch_size, shuffle=shuffle, generator=order, drop_last=True, **options),
        DataLoader(pictures(10_000 + seed, 32), batch_size=32),
    )


class Net(nn.Module):
    """Three convolutions with BN, pooling, a classifier; BN and ReLU in one layer where `fused`."""

    def __init__(self, fused: bool = False, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = _block(3, 8, 1, fused)
        self.body = nn.Sequential(_block(8, 16, 2, fused), _block(16, 16, 2, fused))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.body(self.stem(images))))


def _block(inputs: int, outputs: int, stride: int, fused: bool) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, *([BatchNormAct2d(outputs)] if fused else [nn.BatchNorm2d(outputs), nn.ReLU()]))


def fresh(name: str, seed: int) -> nn.Module:
    """A network from scratch: `net`, `fused`, or a timm name."""
    torch.manual_seed(seed)
    if name in ("net", "fused"):
        return Net(fused=name == "fused")
    return timm.create_model(name, num_classes=CLASSES)


@cache
def _trained(name: str) -> nn.Module:
    model = fresh(name, 0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = DataLoader(pictures(0, 256, SOURCE), 32, shuffle=True, generator=torch.Generator().manual_seed(0))
    for _ in range(8):
        for images, labels in data:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


def pretrained(name: str, seed: int) -> Any:
    """A network that has learnt another task of the same look, with a new classifier."""
    model = copy.deepcopy(_trained(name))
    torch.manual_seed(seed)
    head = model.get_classifier() if hasattr(model, "get_classifier") else model.fc
    head.reset_parameters()
    return model
