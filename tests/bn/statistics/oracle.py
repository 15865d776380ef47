"""What precise-BN must find, by plain PyTorch: every BN layer's inputs kept whole and pooled in float64."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from bnfinetune.bn import find_bn_layers
from bnfinetune.bn.statistics.moments import Moments

Estimate = Callable[[list[np.ndarray]], tuple[np.ndarray, np.ndarray]]


@torch.no_grad()
def inputs_of_layers(
    model: nn.Module, batches: Iterable[torch.Tensor], names: Iterable[str] | None = None
) -> dict[str, list[np.ndarray]]:
    """Inputs of BN layers, each call as (C, values) in float64, with those layers alone in training mode."""
    model = copy.deepcopy(model).eval()
    layers = find_bn_layers(model)
    inputs = defaultdict(list)
    for name in layers if names is None else names:
        layers[name].train()
        layers[name].register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].transpose(0, 1).flatten(1).double().numpy())
        )
    for batch in batches:
        model(batch)
    return dict(inputs)


def pooled(calls: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    values = np.concatenate(calls, axis=1)
    return values.mean(1), values.var(1)


def mean_of_variances(calls: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased batch variances, averaged with the batches' values as weights."""
    counts = [call.shape[1] for call in calls]
    means = np.average([call.mean(1) for call in calls], axis=0, weights=counts)
    return means, np.average([call.var(1, ddof=1) for call in calls], axis=0, weights=counts)


def relative_errors(layer: nn.Module, calls: list[np.ndarray], estimate: Estimate = pooled) -> tuple[float, float]:
    """Largest error of mean and variance; of the mean relative to the larger of mean and standard deviation."""
    mean, var = estimate(calls)
    off_mean = np.abs(layer.running_mean.double().numpy() - mean) / np.maximum(np.abs(mean), np.sqrt(var))
    off_var = np.abs(layer.running_var.double().numpy() - var) / var
    return float(off_mean.max()), float(off_var.max())


def moments_of(x: torch.Tensor) -> Moments:
    """Moments of the values of a tensor (N, C, ...) by two passes in float64."""
    values = x.double().transpose(0, 1).flatten(1)
    if not values.shape[1]:
        return Moments.empty(x.shape[1])
    mean = values.mean(1)
    return Moments(values.shape[1], mean, (values - mean[:, None]).square().sum(1))
