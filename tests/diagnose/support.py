"""Small networks with used statistics, small loaders, and the pasting of fix lines."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Finding, Findings

FAMILIES = ("resnet18", "efficientnet_b0")
INNER = {"resnet18": "layer2.0.bn2", "efficientnet_b0": "blocks.2.0.bn2"}
STAGE = {"resnet18": "layer2", "efficientnet_b0": "blocks.2"}


def network(name: str, num_classes: int = 5) -> nn.Module:
    """A timm network in training mode whose BN layers look trained: no statistic is that of construction."""
    return copy.deepcopy(_network(name, num_classes))


@cache
def _network(name: str, num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes)
    for layer in bnf.find_bn_layers(model).values():
        layer.running_mean.normal_(std=0.1)
        layer.running_var.uniform_(0.5, 1.5)
        layer.num_batches_tracked.fill_(1000)
    return model.train()


def settled(name: str, num_classes: int = 5, *, data: DataLoader | None = None) -> nn.Module:
    """A network whose running statistics are those of the data."""
    model = network(name, num_classes)
    bnf.precise_bn(model, data or loader(64, batch_size=64))
    return model


def loader(
    images: int = 32, *, batch_size: int = 16, size: int = 32, shuffle: bool = True, **options: Any
) -> DataLoader:
    """Seeded random images of five classes that follow each other in turn."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(images, 3, size, size, generator=generator)
    labels = torch.arange(images) % 5
    return DataLoader(TensorDataset(pictures, labels), batch_size=batch_size, shuffle=shuffle, **options)


def sgd(model: nn.Module, lr: float = 1e-4) -> torch.optim.Optimizer:
    """An optimizer over well-chosen groups."""
    return torch.optim.SGD(bnf.param_groups(model, weight_decay=0.0), lr=lr)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One ordinary step."""
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def codes(findings: Findings) -> set[str]:
    return {found.code for found in findings}


def the(findings: Findings, code: str) -> Finding:
    """The one finding of a rule."""
    found = [each for each in findings if each.code == code]
    assert len(found) == 1, f"{code} found {len(found)} times in {findings}"
    return found[0]


def paste(fix: str, **names: Any) -> dict[str, Any]:
    """Runs a fix line as its reader would, and gives back the names that it sees or sets."""
    scope = {"bnf": bnf, "torch": torch, **names}
    exec(fix, scope)
    return scope


@contextmanager
def group_on_cpu() -> Iterator[None]:
    """A process group of one, with a backend for CPUs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
