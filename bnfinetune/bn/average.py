"""The average of several networks of one architecture, with BN statistics of its own.

Networks from one run, or from runs that began at the same weights, often have an average that is better than each of
them (Izmailov et al. 2018, SWA; Kaddour 2022, LAWA; Wortsman et al. 2022, model soups). Its statistics are not the
average of theirs: averaged weights give activations of another variance, mostly a smaller one (Jordan et al. 2023,
REPAIR), which only a pass over data can tell. Where all networks agree in a layer's statistics, as behind frozen ones,
these are what the weights were trained with, and stay.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnfinetune.bn.layers import find_bn_layers, is_bn_layer, unwrap
from bnfinetune.bn.statistics.precise import precise_bn
from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.errors import CheckpointError

State = Mapping[str, Tensor]


class Mean(NamedTuple):
    """The mean of state dicts.

    Attributes:
        state: Tensors by name, each of the type that it had; counters and other integers are those of the last.
        moved: Names of the tensors in which the networks differ.
    """

    state: dict[str, Tensor]
    moved: frozenset[str]


@torch.no_grad()
def mean_of_states(states: Iterable[State]) -> Mean:
    """The mean over state dicts, summed in float64, of which one at a time is held.

    Raises:
        CheckpointError: there is none, or names or shapes differ.
    """
    first: State = {}
    sums: dict[str, Tensor] = {}
    moved: set[str] = set()
    count = 0
    for count, state in enumerate(states, start=1):
        if count == 1:
            first = {name: tensor.detach().cpu() for name, tensor in state.items()}
            sums = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in first.items()}
            continue
        _require_alike(first, state, count)
        for name, tensor in state.items():
            value = tensor.detach().cpu()
            moved.update([name] if not torch.equal(value, first[name]) else [])
            sums[name] = sums[name] + value.double() if value.is_floating_point() else value
    if not count:
        raise CheckpointError("there is nothing to average: give at least one network")
    means = {name: (sums[name] / count if first[name].is_floating_point() else sums[name]) for name in moved}
    state = {name: means[name].to(tensor.dtype) if name in means else tensor.clone() for name, tensor in first.items()}
    return Mean(state, frozenset(moved))


def _require_alike(first: State, other: State, number: int) -> None:
    shapes, theirs = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (first, other))
    unlike = next((name for name in {**shapes, **theirs} if shapes.get(name) != theirs.get(name)), None)
    if unlike is not None:
        raise CheckpointError(
            f"networks of one architecture can be averaged, but {unlike} is {shapes.get(unlike, 'absent')} in the "
            f"first and {theirs.get(unlike, 'absent')} in number {number}"
        )


def layers_that_moved(model: nn.Module, moved: frozenset[str]) -> tuple[str, ...]:
    """Globs of the BN layers whose running statistics differ between the networks that were averaged.

    Args:
        model: the bare network.
        moved: names of tensors, from `mean_of_states`.
    """
    layers = find_bn_layers(model) if any(map(is_bn_layer, model.modules())) else {}
    keys = {name: [f"{name}.{key}".lstrip(".") for key in ("running_mean", "running_var")] for name in layers}
    return tuple(glob.escape(name) for name in layers if not moved.isdisjoint(keys[name]))


def average_networks(
    model: nn.Module, states: Iterable[State], data: Iterable[Any], **options: Any
) -> PreciseBNReport | None:
    """Loads the mean of several networks' weights into a model, with BN statistics computed anew where they differed.

    Args:
        model: a network of their architecture, bare or in a wrapper; it becomes the average.
        states: the `state_dict()` of each bare network; a generator that loads one after the other saves memory.
        data: batches for `precise_bn`, as the network will see them.
        **options: of `precise_bn`, such as `num_samples` or `forward`.

    Returns:
        What `precise_bn` reports; None where no statistics differed, and nothing was read.

    Raises:
        CheckpointError: there is no state, or they are of other networks.
        StatisticsError: the pass over the data failed. After any error the model is as it was.

    Sources: `bnfinetune.bn.average`.
    """
    net = unwrap(model)
    mean = mean_of_states(states)
    _require_alike(net.state_dict(), mean.state, 1)
    before = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict(mean.state)
    layers = layers_that_moved(net, mean.moved)
    if not layers:
        return None
    try:
        return precise_bn(net, data, layers=layers, include_frozen=True, **options)
    except BaseException:
        net.load_state_dict(before)
        raise
