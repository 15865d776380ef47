"""How far estimated population statistics may be from the truth, judged by how much batches differ.

Values within a batch are not independent (pixels of one image, images of one source), so their number says little.
Batches drawn at random are independent, and the spread between them carries everything: the method of batch means,
in its weighted form for a ratio of sums. With batches g of `n_g` values, means `m_g`, variances `v_g`, together `n`,
`m` and `v`, and `u_g = v_g + (m_g - m)^2` (so that `v = sum(n_g u_g) / n`), for G batches

    SE(m)^2 = f G / (G - 1) * sum(n_g^2 (m_g - m)^2) / n^2
    SE(v)^2 = f G / (G - 1) * sum(n_g^2 (u_g - v)^2) / n^2

Neighbours that resemble each other, as in sorted data, make `f = (1 + r) / (1 - r) > 1`: the variance inflation of a
first-order autoregression, with `r` the correlation of neighbouring batches, taken over all channels of a layer. As
batches grow in number, neighbours are merged, so correlation over longer stretches is seen as well.

The errors are given as the layer feels them: of the mean in units of `sqrt(v + eps)`, of the variance relative to
`v + eps`. A channel whose variance is far below `eps` can then be as uncertain as it likes.

Source: Flegal and Jones, "Batch means and spectral variance estimators in Markov chain Monte Carlo", The Annals of
Statistics 38(2), 2010; Cochran, "Sampling Techniques", chapter 6, for the ratio estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnfinetune.bn.statistics.collectives import ProcessGroup, gather_in_rank_order
from bnfinetune.bn.statistics.moments import Moments, Rows

MAX_GROUPS = 64
MIN_GROUPS = 8
"""Batches below which an estimated error means nothing: with 8 it is itself uncertain by a quarter."""

_MAX_CORRELATION = 0.99


class SamplingError(NamedTuple):
    """Estimated standard errors of one layer's statistics, of its worst channel.

    Attributes:
        mean: of the mean, in units of the standard deviation.
        var: of the variance, relative.
        correlation: of neighbouring batches; near 0 for shuffled data.
        groups: how many batches, or merged neighbours, were compared.
    """

    mean: float
    var: float
    correlation: float
    groups: int

    @property
    def worst(self) -> float:
        """The larger of the two errors."""
        return max(self.mean, self.var)


UNKNOWN = SamplingError(float("inf"), float("inf"), 0.0, 0)


class BatchGroups:
    """The batches of one layer, kept apart while they are few and in ever longer groups of neighbours later.

    There are never more than `MAX_GROUPS` groups, however many batches come.

    Args:
        channels: how many channels the layer has.
    """

    def __init__(self, channels: int) -> None:
        none = torch.zeros(0, channels, dtype=torch.float64, device="cpu")
        self._groups = self._open = Rows(none[:, 0], none, none)
        self._span = 1
        self._held = 0

    def add(self, rows: Rows) -> None:
        """Takes the next batches, in order."""
        while batches := len(rows.counts):
            if self._held or batches < self._span:
                taken, rows = rows.split_at(self._span - self._held)
                self._extend_open(taken)
            else:
                room = MAX_GROUPS - len(self._groups.counts)
                taken, rows = rows.split_at(min(batches // self._span, room) * self._span)
                self._groups = self._groups.followed_by(taken.pooled(self._span))
            if len(self._groups.counts) == MAX_GROUPS:
                self._groups = self._groups.pooled(2)
                self._span *= 2

    def _extend_open(self, rows: Rows) -> None:
        joined = self._open.followed_by(rows)
        self._held += len(rows.counts)
        self._open = joined.pooled(len(joined.counts))
        if self._held == self._span:
            self._groups, self._open = self._groups.followed_by(self._open), self._open.split_at(0)[0]
            self._held = 0

    @property
    def rows(self) -> Rows:
        """All batches so far, in groups of neighbours."""
        return self._groups.followed_by(self._open)

    def moments(self) -> Moments:
        """All batches pooled."""
        return Moments.pool(*self.rows)


def sampling_errors(
    groups: Sequence[BatchGroups], pooled: Sequence[Moments], eps: Sequence[float], process_group: ProcessGroup = None
) -> list[SamplingError]:
    """Estimates the error of every layer's pooled statistics.

    Args:
        groups: this rank's batches, layer by layer.
        pooled: the moments over all ranks, layer by layer.
        eps: the layers' eps.
        process_group: the ranks whose batches were pooled; the default group if None.
    """
    parts = [_scatter(*triple) for triple in zip(groups, pooled, eps, strict=True)]
    sums = gather_in_rank_order(torch.cat([torch.cat(part) for part in parts]), process_group).sum(0)
    pieces = torch.split(sums, [t.numel() for part in parts for t in part])
    by_layer = zip(pieces[::3], pieces[1::3], pieces[2::3], pooled, eps, strict=True)
    return [_error(*layer) for layer in by_layer]


def _scatter(groups: BatchGroups, pooled: Moments, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over groups: squared errors of mean and of variance (C,), and [neighbours' products, squares, groups]."""
    counts, means, m2s = groups.rows
    weights = counts[:, None]
    var = pooled.m2 / max(pooled.count, 1)
    shifts = means - pooled.mean
    off = weights * (m2s / weights + shifts.square() - var)
    shifts = weights * shifts
    scaled = shifts / (var + eps).sqrt()
    neighbours = (scaled[1:] * scaled[:-1]).sum(), scaled.square().sum()
    correlation = torch.stack([*neighbours, counts.new_tensor(len(counts))])
    return shifts.square().sum(0), off.square().sum(0), correlation


def _error(mean_squares: Tensor, var_squares: Tensor, sums: Tensor, pooled: Moments, eps: float) -> SamplingError:
    products, squares, n = sums.tolist()
    if n < 2:
        return UNKNOWN
    # The deviations sum to zero, which makes the correlation of independent batches -1/G on average.
    correlation = min(products / squares + 1 / n, _MAX_CORRELATION) if squares else 0.0
    inflation = (1 + correlation) / (1 - correlation) if correlation > 0 else 1.0
    factor = inflation * n / (n - 1) / pooled.count**2
    scale = pooled.var + eps
    mean = (factor * mean_squares / scale).max().sqrt()
    var = (factor * var_squares).sqrt().div(scale).max()
    return SamplingError(float(mean), float(var), correlation, int(n))
