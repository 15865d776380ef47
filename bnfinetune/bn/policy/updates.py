"""Forwards that must leave the running statistics alone, and steps that must be taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from bnfinetune.bn.layers import find_bn_layers, require_known
from bnfinetune.bn.policy.switched_layer import (
    SwitchedBN,
    give_back,
    native_state,
    require_own_forward,
    state_of,
    switches_of,
    take_over,
)
from bnfinetune.bn.population import RENORM_AGE, STATS
from bnfinetune.errors import StatisticsError


@contextmanager
def no_stat_updates(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context, forwards in training mode normalise as ever, but update no running statistics.

    For forwards beside the one that trains: the second pass of SAM, a learning-rate finder, a second view or loss, a
    teacher. Contexts nest. Recomputation by gradient checkpointing never updates, inside or outside.

    Args:
        model: any module with BN layers, under a policy or not, wrapped or not.

    Raises:
        SelectionError: the model has no BN layer.
        LayerError: a layer's class has a `forward` of its own and is not registered, or a layer without a policy keeps
            a `forward` that was put in its class's place.
    """
    layers = find_bn_layers(model)
    for name, layer in layers.items():
        require_known(layer, name)
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, SwitchedBN) or _updates(layer)}
    for name, layer in layers.items():
        if not isinstance(layer, SwitchedBN):
            require_own_forward(layer, name)
    for name, layer in layers.items():
        if not isinstance(layer, SwitchedBN):
            take_over(layer, replace(native_state(name, layer), passing=True))
        cast(SwitchedBN, layer)._bn_holds += 1
    try:
        yield model
    finally:
        for layer in layers.values():
            _release(layer)


def _updates(layer: nn.Module) -> bool:
    return switches_of(layer).update_stats != "none"


def _release(layer: nn.Module) -> None:
    if not isinstance(layer, SwitchedBN):  # restored meanwhile
        return
    layer._bn_holds = max(layer._bn_holds - 1, 0)
    state = state_of(layer)
    if state is not None and state.passing and not layer._bn_holds:
        give_back(layer)


class StatSnapshot:
    """The running statistics of a model as they were at one moment, to go back to.

    A step that the gradient scaler of mixed precision skips has already moved the running statistics; taking a
    snapshot before each step and rolling back the skipped ones undoes that (and so does it for a rejected SAM step).

    Args:
        model: any module with BN layers.

    Examples:
        >>> snapshot = StatSnapshot(model)
        >>> for images, labels in loader:
        ...     snapshot.take()
        ...     train_step(images, labels)
        ...     if scaler_skipped_the_step:
        ...         snapshot.rollback()
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: list[tuple[str, str]] = []
        self._live: list[Tensor] = []
        self._kept: list[Tensor] = []
        find_bn_layers(model)  # a model without any is refused here, not at the first step

    @torch.no_grad()
    def take(self) -> None:
        """Remembers the present running statistics and counters, of every domain, and forgets earlier ones."""
        held = {
            (name, key): buffer
            for name, layer in find_bn_layers(self._model).items()
            for key, buffer in layer._buffers.items()
            if buffer is not None and (key.endswith(STATS) or key == RENORM_AGE)
        }
        live = list(held.values())
        if len(live) == len(self._live) and all(a is b for a, b in zip(live, self._live, strict=True)):
            torch._foreach_copy_(self._kept, live)
        else:
            self._live, self._kept = live, [buffer.clone() for buffer in live]
        self._names = list(held)

    @torch.no_grad()
    def rollback(self, where: Tensor | None = None) -> None:
        """Writes the remembered statistics back into the model's buffers, whichever these are by now.

        Buffers that have been taken off the layers since, as those of a domain are by `restore_bn`, stay off.

        Args:
            where: a boolean scalar on the model's device that says whether to; the host does not wait for it.

        Raises:
            StatisticsError: nothing has been taken yet.
        """
        if not self._names:
            raise StatisticsError("StatSnapshot has nothing to roll back to; call take() before the step")
        layers = find_bn_layers(self._model)
        found = [layers[name]._buffers.get(key) if name in layers else None for name, key in self._names]
        pairs = [(buffer, kept) for buffer, kept in zip(found, self._kept, strict=True) if buffer is not None]
        live, old = [buffer for buffer, _ in pairs], [kept for _, kept in pairs]
        torch._foreach_copy_(live, old if where is None else _chosen(where, old, live))


def _chosen(where: Tensor, true: list[Tensor], false: list[Tensor]) -> list[Tensor]:
    """`torch.where` of many tensors, in three kernels for each dtype."""
    chosen: dict[int, Tensor] = {}
    for dtype in {tensor.dtype for tensor in true}:
        numbers = [number for number, tensor in enumerate(true) if tensor.dtype == dtype]
        one, other = (torch.cat([side[number].flatten() for number in numbers]) for side in (true, false))
        parts = one.where(where, other).split([true[number].numel() for number in numbers])
        chosen |= {number: part.view_as(true[number]) for number, part in zip(numbers, parts, strict=True)}
    return [chosen[number] for number in range(len(true))]
