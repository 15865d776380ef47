"""Batch statistics read off BN layers while they normalise, without a second pass over the data.

For the length of a `with recording(...)` block each layer normalises by its local batch, whatever its mode and
policy, through the same fused kernel that plain BN uses in training. With momentum 1 the kernel leaves the batch's mean
and unbiased variance in whatever buffers it is given; here those are rows of a block that is emptied now and then, the
blocks of all layers in one copy.

Where that kernel is not exact enough, the layer's input is read again, shifted by the batch mean `c` that the kernel
found: `d = x - c` is exact or nearly so, and with `s = sum(d) / n` the mean is `c + s` and the centred second moment
`sum(d^2) - n s^2`, where `s` is tiny, so that nothing cancels. Whether it is exact enough is told from the batches
before the first emptying, which are all read again: asking at once would wait for the accelerator layer by layer.

Where the batch's statistics are to be held back by the stored ones, the layer normalises a second time, by the mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bnfinetune.bn.class_change import has_foreign_forward, input_of_call
from bnfinetune.bn.functional import along, wide_dtype
from bnfinetune.bn.layers import computable_eps, require_known
from bnfinetune.bn.population import population_of
from bnfinetune.bn.statistics.moments import Rows, mixture
from bnfinetune.bn.statistics.transfers import fetch
from bnfinetune.errors import LayerError, StatisticsError

BLOCK = 16
"""Batches that a layer keeps on its device before they are widened to float64 and moved to the CPU."""

MAX_MEAN_TO_STD = 100.0
"""A native fp32 kernel errs by about 1e-7 of the mean: at this ratio by 1e-5 of the standard deviation."""

_CONSTANT = 2.0**-23
_MISSING = object()


class _Row(NamedTuple):
    """How many values per channel a recorded batch had, and whether it was read again."""

    values: int
    reread: bool


class LayerRecorder:
    """Stands in for the `forward` of one BN layer and keeps the statistics of every batch that it normalises.

    Args:
        name: the layer's qualified name.
        layer: the layer.
        keep: False only normalises, and records nothing.
        share: weight of the batch's statistics beside the stored in what the layer normalises by.

    Attributes:
        eps: added to the variance.
        reread: whether the layer's inputs are read a second time; None as long as that is open.

    Raises:
        LayerError: the layer's class has a `forward` of its own and is not registered, or the layer itself has one.
    """

    def __init__(self, name: str, layer: nn.Module, keep: bool = True, share: float = 1.0) -> None:
        self.name = name
        self.layer = layer
        self.share = share
        self.reread: bool | None = None if keep else False
        self._keep = keep
        self._tail = require_known(layer, name).tail
        if has_foreign_forward(layer) and not isinstance(vars(layer)["forward"], LayerRecorder):
            raise LayerError(
                f"BN layer {name!r} has a forward of its own (layer.forward = ...), which recording its statistics "
                "would leave out; delete it for the pass, or exclude the layer"
            )
        self.eps = computable_eps(layer, name)
        self._key: tuple[torch.device, torch.dtype] | None = None
        self._full: list[tuple[list[_Row], Tensor]] = []
        self._rows: list[_Row] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Normalises a batch (N, C, ...) by its own statistics, then applies what the layer applies after that."""
        return self._tail(self.layer, self._normalise(input_of_call(None, args, kwargs)))

    def _normalise(self, x: Tensor) -> Tensor:
        n = x.numel() // x.shape[1] if x.numel() else 0
        if n == 0:
            return x
        mean, var, shift, squares = self._next_row(x)
        if n == 1:
            # One value has variance 0 and normalises to 0; the fused kernel refuses it.
            mean.copy_(x.reshape(-1))
            zero = var.zero_()
            y = F.batch_norm(torch.zeros_like(x), zero, zero, self._weight, self._bias, False, 0.0, self.eps)
        else:
            y = F.batch_norm(x, mean, var, self._weight, self._bias, True, 1.0, self.eps)
        if self.share != 1:
            y = self._held_back(x, mean, var * ((n - 1) / n))
        if self._keep:
            if self.reread is None:
                self.reread = _rereads_anyway(x)
            reread = n > 1 and self.reread is not False
            if reread:
                _read_again(x, mean, shift, squares)
            self._rows.append(_Row(n, reread))
        return y

    def _held_back(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalises a batch by its mean and biased variance, each (C,), held back by the stored ones."""
        stored = population_of(self.layer).require_stats()
        mixed = mixture(stored.mean.to(mean.dtype), stored.var.to(var.dtype), mean, var, self.share)
        return F.batch_norm(x, *mixed, self._weight, self._bias, False, 0.0, self.eps)

    def take(self) -> list[tuple[list[_Row], Tensor]]:
        """Takes out what was recorded since the last time: blocks (planes, rows, C), overwritten by the next batch."""
        self._close_block()
        taken, self._full = self._full, []
        return taken

    def rows_of(self, blocks: list[tuple[list[_Row], Tensor]]) -> Rows:
        """What `take` gave, fetched from the device, as rows.

        Raises:
            StatisticsError: a batch's statistics are not finite.
        """
        rows = Rows(*map(torch.cat, zip(*(_exact_rows(*block) for block in blocks), strict=True)))
        if not (rows.means.isfinite().all() and rows.m2s.isfinite().all()):
            raise StatisticsError(
                f"BN layer {self.name!r} saw a batch with NaN or infinite activations; "
                "look for damaged inputs, overflow in half precision, or weights that are not finite"
            )
        many = rows.counts > 1
        if self.reread is None and many.any():
            mean, std = rows.means[many].abs(), rows.unbiased()[many].sqrt()
            # Constant channels, as dead filters have, are exact as they are.
            self.reread = bool(((mean > MAX_MEAN_TO_STD * std) & (std > _CONSTANT * mean)).any())
        return rows

    def _next_row(self, x: Tensor) -> tuple[Tensor, ...]:
        key = (x.device, wide_dtype(x.dtype))
        if key != self._key:
            self._close_block()
            self._check_shape(x)
            self._key = key
            weight, bias = population_of(self.layer).affine
            self._weight = None if weight is None else weight.detach().to(key[1])
            self._bias = None if bias is None else bias.detach().to(key[1])
            self._new_block(x.shape[1])
        elif len(self._rows) == BLOCK:
            self._close_block()
            self._new_block(x.shape[1])
        k = len(self._rows)
        return self._planes[0][k], self._planes[1][k], self._planes[2][k], self._planes[3][k]

    def _new_block(self, channels: int) -> None:
        assert self._key is not None
        device, dtype = self._key
        self._block = torch.zeros(4, BLOCK if self._keep else 1, channels, device=device, dtype=dtype)
        self._planes = [plane.unbind() for plane in self._block]

    def _check_shape(self, x: Tensor) -> None:
        check = getattr(self.layer, "_check_input_dim", None)
        if check is not None and getattr(check, "__func__", None) is not _NormBase._check_input_dim:
            check(x)

    def _close_block(self) -> None:
        if self._rows:
            planes = 4 if any(row.reread for row in self._rows) else 2
            self._full.append((self._rows, self._block[:planes, : len(self._rows)]))
            self._rows = []


def _rereads_anyway(x: Tensor) -> bool | None:
    """Whether a layer's inputs are read again, as far as that is clear without a look at their values."""
    if x.dtype == torch.float64:
        return False
    if x.device.type == "cpu" and (x.ndim == 2 or not x.is_contiguous()):
        return True  # this kernel sums in fp32 one value after the other, and errs by 2e-6 even around mean 0
    return None


def _read_again(x: Tensor, around: Tensor, shift: Tensor, squares: Tensor) -> None:
    """Sums of a batch's distances from `around` (C,), and of their squares."""
    dims = [0, *range(2, x.ndim)]
    distances = x - around.view(along(1, x.ndim))
    shift.copy_(distances.sum(dims))
    squares.copy_(distances.square_().sum(dims))


def _exact_rows(rows: list[_Row], planes: Tensor) -> Rows:
    """Rows in float64 from the planes mean, unbiased variance and, where batches were read again, sums of distances."""
    counts = torch.tensor([row.values for row in rows], dtype=torch.float64, device="cpu")
    means, m2s = planes[0], planes[1] * (counts - 1)[:, None]  # undoes Bessel's correction
    if len(planes) > 2:
        reread = torch.tensor([row.reread for row in rows], device="cpu")[:, None]
        shift = planes[2] / counts[:, None]
        means = torch.where(reread, means + shift, means)
        m2s = torch.where(reread, planes[3] - planes[2] * shift, m2s)
    return Rows(counts, means, m2s)


def drain(recorders: Mapping[str, LayerRecorder]) -> dict[str, Rows]:
    """Takes out what layers have recorded since the last time, in one copy; layers that were not called are left out.

    Raises:
        StatisticsError: a batch's statistics are not finite.
    """
    taken = {name: blocks for name, recorder in recorders.items() if (blocks := recorder.take())}
    fetched = iter(fetch([planes for blocks in taken.values() for _, planes in blocks]))
    return {
        name: recorders[name].rows_of([(rows, next(fetched)) for rows, _ in blocks]) for name, blocks in taken.items()
    }


@contextmanager
def recording(
    layers: Mapping[str, nn.Module], *, keep: bool = True, share: float = 1.0
) -> Iterator[dict[str, LayerRecorder]]:
    """Lets BN layers normalise by their local batch and records the statistics, for the length of the block.

    Args:
        layers: BN layers by qualified name.
        keep: False records nothing.
        share: weight of the batch's statistics beside the stored in what the layers normalise by.

    Yields:
        A recorder for each layer, by the same name.

    Raises:
        LayerError: a layer's class has a `forward` of its own and is not registered, or the layer itself has one.
    """
    recorders = {name: LayerRecorder(name, layer, keep, share) for name, layer in layers.items()}
    with forwards_replaced({recorder.layer: recorder for recorder in recorders.values()}):
        yield recorders


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Gives modules another `forward` for the length of the block; hooks on the modules go on working.

    So do those of accelerate, which keep what they call under a name of their own.
    """
    keys = {module: "_old_forward" if "_hf_hook" in vars(module) else "forward" for module in forwards}
    before = {module: vars(module).get(key, _MISSING) for module, key in keys.items()}
    try:
        for module, forward in forwards.items():
            vars(module)[keys[module]] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is _MISSING:
                vars(module).pop(keys[module], None)
            else:
                vars(module)[keys[module]] = forward
