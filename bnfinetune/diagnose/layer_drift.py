"""Stored statistics of BN layers against those of data, seen image by image.

A pre-hook on each layer keeps the mean and centred second moment of every image, channel by channel. From these rows
follow the statistics of all images together, their sampling error, and how noisy the statistics of a batch of any size
are: the mean of B independent images has the variance of one image's mean divided by B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnfinetune.bn.class_change import input_of_call
from bnfinetune.bn.population import population_of
from bnfinetune.bn.statistics.moments import Moments, Rows


@dataclass(frozen=True)
class LayerDrift:
    """How far one layer's stored statistics are from those of the images; tensors have shape (C,), float64.

    With stored mean m and variance v, measured ones M and V, and s = sqrt(v + eps): the layer gives out channels of
    mean `z` and standard deviation `sqrt(r)` where it should give out 0 and 1 (before weight and bias).

    Attributes:
        images: how many images were measured.
        mean_shift: z = (M - m) / s.
        log_var_ratio: log r, with r = (V + eps) / (v + eps).
        symmetric_kl: KL(p|q) + KL(q|p) of the Gaussians N(m, v + eps) and N(M, V + eps).
        mean_noise: variance of one image's mean, in units of s squared.
        var_noise: variance of one image's second moment about M, in units of r times s to the fourth.
        importance: share of each channel in the layer's output, weight squared; sums to 1.
    """

    images: int
    mean_shift: Tensor
    log_var_ratio: Tensor
    symmetric_kl: Tensor
    mean_noise: Tensor
    var_noise: Tensor
    importance: Tensor

    @property
    def distance(self) -> Tensor:
        """Wasserstein distance of the two Gaussians in units of s: sqrt(z^2 + (sqrt(r) - 1)^2), shape (C,)."""
        return torch.hypot(self.mean_shift, (self.log_var_ratio / 2).exp() - 1)

    @property
    def drift(self) -> float:
        """Root mean square distance over channels, weighed by importance, without what sampling alone would give."""
        squared = float(self.importance @ self.distance.square())
        return math.sqrt(max(squared - self.noise(self.images) ** 2, 0.0))

    @property
    def is_sure(self) -> bool:
        """Whether it is more than images drawn from the stored population give in 1 of 100 samples.

        The squared distance over its expectation is a weighted sum of squares of normal variables; whatever the
        weights, it exceeds 9 no more often than the square of one such variable does, in 0.3 % (Szekely and Bakirov
        2003, "Extremal probabilities for Gaussian quadratic forms"). The rest of the 1 % is for the expectation, which
        is estimated from the same images.
        """
        return float(self.importance @ self.distance.square()) > 9 * self.noise(self.images) ** 2

    def noise(self, batch: int) -> float:
        """Expected distance of the statistics of a batch of so many images from those of all, in units of s.

        `sqrt(mean_noise / B + var_noise / (4 B))` by the delta method, averaged over channels as in `drift`.
        """
        return math.sqrt(float(self.importance @ (self.mean_noise + self.var_noise / 4)) / batch)


def compare(layer: nn.Module, rows: Rows) -> LayerDrift:
    """Compares a layer's running statistics with the rows of some images, one row each.

    Args:
        layer: a BN layer that keeps running statistics.
        rows: counts (K,), means (K, C) and centred second moments (K, C) of K images.
    """
    stats = population_of(layer).stats
    assert stats is not None, "the layer keeps no running statistics"
    stored_mean, stored_var = stats.mean.detach().cpu().double(), stats.var.detach().cpu().double()
    eps = population_of(layer).eps
    pooled = Moments.pool(rows.counts, rows.means, rows.m2s)
    scale = stored_var.clamp(min=0) + eps
    offset, ratio = pooled.mean - stored_mean, (pooled.var + eps) / scale
    around = rows.m2s / rows.counts[:, None] + (rows.means - pooled.mean).square()
    kl = 0.5 * (ratio + 1 / ratio - 2 + offset.square() * (1 / scale + 1 / (pooled.var + eps)))
    return LayerDrift(
        images=len(rows.counts),
        mean_shift=offset / scale.sqrt(),
        log_var_ratio=ratio.log(),
        symmetric_kl=kl,
        mean_noise=_variance(rows.means) / scale,
        var_noise=_variance(around) / scale.square() / ratio,
        importance=_importance(layer, len(scale)),
    )


class Stored(NamedTuple):
    """A layer's running statistics at some moment, float64 on the CPU, shape (C,)."""

    mean: Tensor
    var: Tensor


def stored_of(layers: Mapping[str, nn.Module]) -> dict[str, Stored]:
    """Copies of the running statistics of every layer that keeps some."""
    found = {name: population_of(layer).stats for name, layer in layers.items()}
    return {
        name: Stored(*(buffer.detach().to("cpu", torch.float64, copy=True) for buffer in (stats.mean, stats.var)))
        for name, stats in found.items()
        if stats is not None
    }


def moved(layer: nn.Module, before: Stored) -> float:
    """How far a layer's running statistics have moved: as `LayerDrift.drift`, in standard deviations of before."""
    now = stored_of({"": layer})[""]
    eps = population_of(layer).eps
    scale = before.var.clamp(min=0) + eps
    shift, ratio = (now.mean - before.mean) / scale.sqrt(), (now.var + eps) / scale
    squared = shift.square() + (ratio.sqrt() - 1).square()
    return math.sqrt(float(_importance(layer, len(scale)) @ squared))


def _variance(rows: Tensor) -> Tensor:
    return rows.var(0, correction=1) if len(rows) > 1 else torch.full_like(rows[0], math.inf)


def _importance(layer: nn.Module, channels: int) -> Tensor:
    weight, _ = population_of(layer).affine
    squares = torch.ones(channels, dtype=torch.float64, device="cpu")
    if weight is not None and weight.any():
        squares = weight.detach().cpu().double().square()
    return squares / squares.sum()


@dataclass
class ImageRows:
    """Rows of the images that layers saw, by layer.

    Attributes:
        images: images in the present batch; tells tokens of one image from images where a layer sees them mixed.
    """

    images: int = 0
    _rows: dict[str, list[Rows]] = field(default_factory=dict)

    def of(self, name: str) -> Rows | None:
        """All rows of a layer, in order; None if it was not called."""
        parts = self._rows.get(name)
        return None if not parts else Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def add(self, name: str, x: Tensor) -> None:
        """Takes the rows of one input (N, C, ...)."""
        values = x.detach().flatten(2) if x.ndim > 2 else x.detach()[:, :, None]
        folds, rest = divmod(len(values), self.images) if self.images else (1, 0)
        if folds > 1 and not rest:
            values = values.unflatten(0, (self.images, folds)).transpose(1, 2).flatten(2)
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        var, mean = (t.cpu().double() for t in torch.var_mean(wide, -1, correction=0))
        counts = torch.full((len(values),), float(values.shape[-1]), dtype=torch.float64, device="cpu")
        self._rows.setdefault(name, []).append(Rows(counts, mean, var * counts[:, None]))


@contextmanager
def observing(layers: Mapping[str, nn.Module]) -> Iterator[ImageRows]:
    """Keeps rows of every image that these layers see within the block; set `images` before each batch."""
    seen = ImageRows()

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.add(name, input_of_call(None, args, kwargs)), with_kwargs=True
        )

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def drifts(layers: Mapping[str, nn.Module], seen: ImageRows) -> dict[str, LayerDrift]:
    """Compares every layer that was called and keeps running statistics."""
    return {
        name: compare(layer, rows)
        for name, layer in layers.items()
        if population_of(layer).stats is not None and (rows := seen.of(name)) is not None
    }
