"""Batch statistics read off BN layers while they normalise, without a second pass over the data.

For the length of a `with recording(...)` block each layer normalises by its local batch, whatever its mode and
policy, through the same fused kernel that plain BN uses in training. With momentum 1 the kernel leaves the batch's mean
and unbiased variance in whatever buffers it is given; here those are rows of a block that is emptied now and then.

Where that kernel is not exact enough, the layer's input is read again, shifted by the batch mean `c` that the kernel
found: `d = x - c` is exact or nearly so, and with `s = sum(d) / n` the mean is `c + s` and the centred second moment
`sum(d^2) - n s^2`, where `s` is tiny, so that nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bnfinetune.bn.functional import along
from bnfinetune.bn.layers import eps_of, require_known
from bnfinetune.bn.population import population_of
from bnfinetune.errors import StatisticsError

BLOCK = 16
"""Batches that a layer keeps before they are widened to float64 and moved to the CPU."""

MAX_MEAN_TO_STD = 100.0
"""A native fp32 kernel errs by about 1e-7 of the mean: at this ratio by 1e-5 of the standard deviation."""

_CONSTANT = 2.0**-23
_MISSING = object()


class Rows(NamedTuple):
    """Statistics of several batches of one layer, float64 on the CPU.

    Attributes:
        counts: values per channel, N*H*W of each batch, shape (K,).
        means: shape (K, C).
        m2s: sums of squared distances from the batch's own mean, shape (K, C).
    """

    counts: Tensor
    means: Tensor
    m2s: Tensor

    def unbiased(self) -> Tensor:
        """Bessel-corrected batch variances, shape (K, C); not finite where a batch has one value per channel."""
        return self.m2s / (self.counts - 1)[:, None]

    def pooled(self, size: int) -> Rows:
        """Every `size` neighbours made one by the law of total variance; K must be a multiple of `size`."""
        if size == 1:
            return self
        channels = self.means.shape[1]
        counts, means = self.counts.view(-1, size), self.means.view(-1, size, channels)
        total = counts.sum(1)
        offsets = means - means[:, :1]
        mean = means[:, :1] + ((counts / total[:, None])[..., None] * offsets).sum(1, keepdim=True)
        between = (counts[..., None] * (means - mean).square()).sum(1)
        return Rows(total, mean[:, 0], self.m2s.view(-1, size, channels).sum(1) + between)

    def split_at(self, k: int) -> tuple[Rows, Rows]:
        """The first k batches, and the others."""
        return Rows(*(t[:k] for t in self)), Rows(*(t[k:] for t in self))

    def followed_by(self, other: Rows) -> Rows:
        """These rows and then the others."""
        return Rows(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


class LayerRecorder:
    """Stands in for the `forward` of one BN layer and keeps the statistics of every batch that it normalises.

    Attributes:
        name: the layer's qualified name.
        layer: the layer.
        eps: added to the variance.
        reread: whether the layer's inputs are read a second time; decided at its first batch of several values.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name = name
        self.layer = layer
        self.reread: bool | None = None
        self._tail = require_known(layer, name).tail
        self.eps = eps_of(layer, name)
        self._key: tuple[torch.device, torch.dtype] | None = None
        self._full: list[Rows] = []
        self._counts: list[int] = []
        self._exact: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises a batch (N, C, ...) by its own statistics, then applies what the layer applies after that."""
        n = x.numel() // x.shape[1] if x.numel() else 0
        if n == 0:
            return self._tail(self.layer, x)
        k = self._next_row(x)
        mean, var = self._means[k], self._vars[k]
        if n == 1:
            # One value has variance 0 and normalises to 0; the fused kernel refuses it.
            mean.copy_(x.reshape(-1))
            zero = var.zero_()
            y = F.batch_norm(torch.zeros_like(x), zero, zero, self._weight, self._bias, False, 0.0, self.eps)
        else:
            y = F.batch_norm(x, mean, var, self._weight, self._bias, True, 1.0, self.eps)
        self._counts.append(n)
        if self.reread is None and n > 1:
            self.reread = _needs_rereading(x, mean, var)
        if self.reread:
            self._exact[k] = _read_again(x, mean, n)
        return self._tail(self.layer, y)

    def drain(self) -> Rows | None:
        """Takes out what was recorded since the last time; None if the layer was not called.

        Raises:
            StatisticsError: a batch's statistics are not finite.
        """
        self._empty_block()
        if not self._full:
            return None
        rows = Rows(*(torch.cat(parts) for parts in zip(*self._full, strict=True)))
        self._full = []
        if not (rows.means.isfinite().all() and rows.m2s.isfinite().all()):
            raise StatisticsError(
                f"BN layer {self.name!r} saw a batch with NaN or infinite activations; "
                "look for damaged inputs, overflow in half precision, or weights that are not finite"
            )
        return rows

    def _next_row(self, x: Tensor) -> int:
        key = (x.device, torch.promote_types(x.dtype, torch.float32))
        if key != self._key:
            self._empty_block()
            self._check_shape(x)
            self._key = key
            channels = x.shape[1]
            self._block = torch.zeros(2, BLOCK, channels, device=key[0], dtype=key[1])
            self._means, self._vars = self._block[0].unbind(), self._block[1].unbind()
            weight, bias = population_of(self.layer).affine
            self._weight = None if weight is None else weight.detach().to(key[1])
            self._bias = None if bias is None else bias.detach().to(key[1])
        elif len(self._counts) == BLOCK:
            self._empty_block()
        return len(self._counts)

    def _check_shape(self, x: Tensor) -> None:
        check = getattr(self.layer, "_check_input_dim", None)
        if check is not None and getattr(check, "__func__", None) is not _NormBase._check_input_dim:
            check(x)

    def _empty_block(self) -> None:
        if not self._counts:
            return
        counts = torch.tensor(self._counts, dtype=torch.float64)
        means, variances = self._block[:, : len(counts)].cpu().to(torch.float64, copy=True).unbind()
        m2s = variances * (counts - 1)[:, None]  # undoes Bessel's correction
        for k, (mean, m2) in self._exact.items():
            means[k], m2s[k] = mean, m2
        self._full.append(Rows(counts, means, m2s))
        self._counts, self._exact = [], {}


def _needs_rereading(x: Tensor, mean: Tensor, var: Tensor) -> bool:
    if x.dtype == torch.float64:
        return False
    if x.device.type == "cpu" and (x.ndim == 2 or not x.is_contiguous()):
        return True  # this kernel sums in fp32 one value after the other, and errs by 2e-6 even around mean 0
    mean, std = mean.abs(), var.sqrt()
    # Constant channels, as dead filters have, are exact as they are.
    return bool(((mean > MAX_MEAN_TO_STD * std) & (std > _CONSTANT * mean)).any())


def _read_again(x: Tensor, around: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean and centred second moment of a batch's channels, each (C,) in float64, by distances from `around`."""
    dims = [0, *range(2, x.ndim)]
    distances = x - around.view(along(1, x.ndim))
    shift, squares = distances.sum(dims), distances.square_().sum(dims)
    wide = [(t.cpu() if t.device.type == "mps" else t).double() for t in (around, shift, squares)]
    return wide[0] + wide[1] / n, wide[2] - wide[1].square() / n


@contextmanager
def recording(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, LayerRecorder]]:
    """Lets BN layers normalise by their local batch and records the statistics, for the length of the block.

    Args:
        layers: BN layers by qualified name.

    Yields:
        A recorder for each layer, by the same name.

    Raises:
        LayerError: a layer's class has a `forward` of its own and is not registered.
    """
    recorders = {name: LayerRecorder(name, layer) for name, layer in layers.items()}
    with forwards_replaced({recorder.layer: recorder for recorder in recorders.values()}):
        yield recorders


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, object]) -> Iterator[None]:
    """Gives modules another `forward` for the length of the block; hooks on the modules go on working."""
    before = {module: vars(module).get("forward", _MISSING) for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is _MISSING:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
