"""Small models with random weights, statistics and affine, each in plain and fused BN."""

from __future__ import annotations

import copy
from functools import cache

import timm
import torch
from torch import nn

from bnfinetune.bn import find_bn_layers

BACKBONES = ("resnet18", "efficientnet_b0")


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every BN layer statistics and an affine that no default value could pass for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in find_bn_layers(model).values():
            for tensor, low, high in (
                (layer.running_mean, -0.2, 0.2),
                (layer.running_var, 0.6, 1.8),
                (layer.weight, 0.5, 1.5),
                (layer.bias, -0.3, 0.3),
            ):
                if tensor is not None:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * (high - low) + low)
    return model


@cache
def _built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=5))


def backbone(name: str) -> nn.Module:
    """A fresh copy of a timm model with 5 classes, in training mode."""
    return copy.deepcopy(_built(name)).train()


def toy(norm: type[nn.Module] | None = None, channels: int = 6) -> nn.Sequential:
    """Convolution, BN, activation, twice: the second BN is of the class `norm`."""
    torch.manual_seed(0)
    norm = norm or nn.BatchNorm2d
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3), norm(channels)
    )
    return randomise(model)


def images(batch: int = 4, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything in the `state_dict`."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """The names under which two `state_dict`s do not hold the same bits."""
    assert list(a) == list(b)
    return [name for name in a if not torch.equal(a[name], b[name])]
