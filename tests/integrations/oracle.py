"""What the statistics of a network must be, found by an untouched network of the same weights in float64."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from bnfinetune.bn import find_bn_layers
from tests.bn.statistics.oracle import inputs_of_layers, pooled


def worst_error(plain: nn.Module, seen: dict[str, torch.Tensor], images: torch.Tensor) -> float:
    """How far running statistics are from those of all images in one batch, relative to the standard deviation.

    Args:
        plain: a network of the same keys, under no policy.
        seen: its `state_dict`, whose statistics are judged by its own weights.
        images: (N, C, H, W).
    """
    network = copy.deepcopy(plain).double()
    network.load_state_dict(seen)
    inputs = inputs_of_layers(network, [images.double()])
    assert set(inputs) == set(find_bn_layers(network))
    errors = []
    for name, calls in inputs.items():
        mean, var = pooled(calls)
        found_mean, found_var = (seen[f"{name}.{key}"].double().numpy() for key in ("running_mean", "running_var"))
        errors += [(np.abs(found_mean - mean) / np.sqrt(var)).max(), (np.abs(found_var - var) / var).max()]
    return float(max(errors))
