"""Mergeable moments: count, mean and centred second moment of each channel, in float64.

Two sets of values with counts `n_a, n_b`, means `m_a, m_b` and centred second moments `M_a, M_b` (the sums of squared
distances from the set's own mean) have together, with `d = m_b - m_a` and `n = n_a + n_b`,

    m = m_a + d * n_b / n
    M = M_a + M_b + d^2 * n_a * n_b / n

No step subtracts two large, nearly equal numbers, as `E[x^2] - E[x]^2` does: there fp32 gives a negative variance
for values of mean 1000 and standard deviation 0.01.

Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and recommendations",
The American Statistician 37(3), 1983.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from bnfinetune.bn.statistics.collectives import ProcessGroup, gather_in_rank_order


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


@dataclass(frozen=True)
class Moments:
    """Count, mean and centred second moment of the values of each channel.

    Attributes:
        count: how many values (or what total weight) each channel has.
        mean: shape (C,), float64 on the CPU; meaningless where the count is 0.
        m2: sum of squared distances from the mean, shape (C,), float64 on the CPU.
    """

    count: float
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Moments of no values at all, the neutral element of `merge`."""
        zeros = torch.zeros(channels, dtype=torch.float64, device="cpu")
        return cls(0, zeros, zeros.clone())

    @classmethod
    def pool(cls, counts: Tensor, means: Tensor, m2s: Tensor) -> Moments:
        """Pools many sets at once by the law of total variance.

        With weights `n_i`, means `m_i` and centred second moments `M_i`: `m = sum(n_i m_i) / sum(n_i)` and
        `M = sum(M_i + n_i (m_i - m)^2)`.

        Args:
            counts: shape (K,).
            means: shape (K, C).
            m2s: shape (K, C).
        """
        counts, means, m2s = counts.double(), means.double(), m2s.double()
        present = counts > 0
        if not present.any():
            return cls.empty(means.shape[1])
        counts, means, m2s = counts[present], means[present], m2s[present]
        total = counts.sum()
        # Weighing distances from the first mean, not the means themselves, keeps equal means equal to the last bit.
        mean = means[0] + (counts / total) @ (means - means[0])
        return cls(total.item(), mean, m2s.sum(0) + counts @ (means - mean).square())

    @property
    def var(self) -> Tensor:
        """Population variance (divided by the count), shape (C,)."""
        return self.m2 / self.count

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of values together."""
        if not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * (self.count * share))


def mixture(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Mean and variance, each (C,), of two populations together, of which the other makes up `share`."""
    between = share * (1 - share) * (mean - other_mean).square()
    return torch.lerp(mean, other_mean, share), torch.lerp(var, other_var, share) + between


def all_reduce_moments(moments: Sequence[Moments], group: ProcessGroup = None) -> list[Moments]:
    """Merges each moments with its counterparts on the other ranks, from rank 0 to the last.

    One collective carries all of them. Every rank merges in the same order, so the results have the same bits
    everywhere; a rank without values (count 0) takes part and changes nothing.

    Args:
        moments: of the same length and channels on every rank.
        group: the process group; the default group if None.
    """
    counts = torch.tensor([float(part.count) for part in moments], dtype=torch.float64, device="cpu")
    gathered = gather_in_rank_order(torch.cat([counts, *(t for part in moments for t in (part.mean, part.m2))]), group)
    sizes = [len(part.mean) for part in moments for _ in range(2)]
    by_rank = []
    for row in gathered:
        row_counts, *tensors = row.split([len(moments), *sizes])
        columns = zip(row_counts.tolist(), tensors[::2], tensors[1::2], strict=True)
        by_rank.append([Moments(count, mean, m2) for count, mean, m2 in columns])
    return [reduce(Moments.merge, parts) for parts in zip(*by_rank, strict=True)]
