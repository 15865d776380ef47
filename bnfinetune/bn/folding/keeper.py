"""Folded parameters kept over forwards, in scopes whose owner makes no change that tensors do not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from bnfinetune.bn.layers import eps_of
from bnfinetune.bn.population import population_of

T = TypeVar("T")


class Keeper:
    """Keeps what follows from the parameters of convs and a BN layer over forwards, until one of them changes.

    Changes that leave no trace in a tensor, as `p.data.mul_(2)` does, go unseen: for scopes whose owner makes none.
    """

    def __init__(self) -> None:
        self._kept: dict[nn.Module, tuple[list[tuple[Tensor, int, int]], tuple[Any, ...], Any]] = {}

    def keep(
        self, of: nn.Module, bn: nn.Module, learned: list[Tensor], dtype: torch.dtype | None, make: Callable[[], T]
    ) -> T:
        """What `make` computes from a BN layer's statistics and from what was learned, as long as these stay.

        Args:
            of: the module that it is kept for.
            bn: the BN layer.
            learned: the other tensors that it is computed from.
            dtype: what else it depends on.
            make: computes it.
        """
        sources = [*learned, *(population_of(bn).stats or ())[:2]]
        if any(tensor.is_inference() for tensor in sources):
            return make()
        state = [(tensor, tensor._version, tensor.data_ptr()) for tensor in sources]
        setting = (dtype, eps_of(bn))
        known = self._kept.get(of)
        if known is not None and known[1] == setting and _is_same(known[0], state):
            return cast(T, known[2])
        # Inference tensors could not be used in a later forward that trains.
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        self._kept[of] = state, setting, made
        return made


def _is_same(before: list[tuple[Tensor, int, int]], now: list[tuple[Tensor, int, int]]) -> bool:
    pairs = zip(before, now, strict=False)
    return len(before) == len(now) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in pairs)
