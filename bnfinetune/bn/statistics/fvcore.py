"""Drop-ins for the functions of fvcore that recompute running statistics (fvcore/nn/precise_bn.py)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bnfinetune.bn.layers import find_bn_layers, unwrap
from bnfinetune.bn.statistics.collectives import require_same_layers, together
from bnfinetune.bn.statistics.layer_statistics import recorded, require_values, write
from bnfinetune.bn.statistics.precise import channels, is_frozen, transaction
from bnfinetune.bn.statistics.statistics_pass import Limits, Pass
from bnfinetune.errors import SelectionError


@torch.no_grad()
def update_bn_stats(
    model: nn.Module, data_loader: Iterable[Any], num_iters: int = 200, progress: str | None = None
) -> None:
    """Recomputes the running statistics of BN layers in training mode: a drop-in for fvcore's function of this name.

    Every batch is handed to the model unchanged, and all modes stay as they are: layers to update must be in training
    mode. Unlike fvcore's, variances are never negative, layers that no batch reaches keep their statistics, a layer
    may be called several times in a forward, ranks pool their statistics, buffers stay the same objects, and whatever
    fails leaves the model as it was. As there, `num_batches_tracked` counts the calls.

    Args:
        model: a model whose BN layers to update are in training mode.
        data_loader: an iterable of what the model takes.
        num_iters: how many batches to read on each rank.
        progress: None, or "tqdm" for a progress bar.

    Raises:
        ShortDataError: the data ended before `num_iters`; also an `AssertionError`, as in fvcore.
        StatisticsError: values that are not finite, or a fault on another rank.
    """
    net = unwrap(model)

    def plan_pass() -> tuple[Limits, dict[str, nn.Module]]:
        layers = _layers_in_training(net)
        require_values(layers)
        return Limits(num_batches=num_iters), layers

    limits, layers = together(plan_pass)
    if not layers:
        warnings.warn(
            "update_bn_stats found no BN layer in training mode whose statistics are updated, and changes nothing; "
            "call model.train() first, or use precise_bn, which works in either mode",
            stacklevel=3,
        )
        return
    with transaction(net):
        require_same_layers(channels(layers))
        with recorded(layers, "pooled") as statistics:
            run = Pass(net, data_loader, statistics, limits, progress=progress == "tqdm", drop_padding=False)
            run.run()
        write(statistics, run.new_statistics(with_errors=False), count_batches=True)


def get_bn_modules(model: nn.Module) -> list[nn.Module]:
    """The BN layers in training mode whose running statistics are updated: a drop-in for fvcore's function.

    Args:
        model: any module; without BN layers, the list is empty.
    """
    return list(_layers_in_training(model).values())


def _layers_in_training(model: nn.Module) -> dict[str, nn.Module]:
    try:
        layers = find_bn_layers(model)
    except SelectionError:
        return {}
    return {name: layer for name, layer in layers.items() if layer.training and not is_frozen(layer)}
