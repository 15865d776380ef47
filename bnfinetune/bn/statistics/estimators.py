"""Three estimates of population statistics from batch statistics, for fixed weights.

With `n_i = N*H*W` values in batch i, batch mean `m_i`, biased variance `v_i` and unbiased `s_i = v_i n_i / (n_i - 1)`:

- `pooled`: the mean and variance of all values at once, by the law of total variance,
  `m = sum(n_i m_i) / sum(n_i)`, `v = sum(n_i (v_i + (m_i - m)^2)) / sum(n_i)`. It does not depend on how the data is
  split into batches (for the first BN layer; deeper layers see what batch normalisation left). Source: Wu and Johnson,
  "Rethinking 'Batch' in BatchNorm", 2021, appendix.
- `mean`: the same mean, and the average of the unbiased batch variances, `v = sum(n_i s_i) / sum(n_i)`, over batches
  with at least two values. It leaves out how much batches differ from each other. Source: Ioffe and Szegedy,
  "Batch Normalization", 2015, section 3.1 and algorithm 2.
- `ema`: what PyTorch does in training, `m <- (1 - h) m + h m_i`, `v <- (1 - h) v + h s_i`, from the present statistics
  on, with momentum h (None: `h = 1 / k` at the layer's k-th batch). Its variance never goes below what the last `1/h`
  batches allow, however long it runs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bnfinetune.bn.statistics.moments import Moments, Rows

VARIANCES = ("pooled", "mean", "ema")


class Estimator(Protocol):
    """How one layer's population statistics come about.

    What ranks merge, in rank order, are two `Moments` of each layer: of all its values, and the estimator's own.
    """

    def add(self, rows: Rows) -> None:
        """Takes the next batches, in order."""

    def moments(self) -> Moments:
        """This rank's own part."""

    def result(self, pooled: Moments, own: Moments) -> tuple[Tensor, Tensor]:
        """Mean and variance, each (C,), from the moments of all values and the own parts of all ranks together."""


class PooledEstimate:
    """The moments of all values are all there is."""

    def add(self, rows: Rows) -> None:
        """Takes nothing more."""

    def moments(self) -> Moments:
        """An empty part."""
        return Moments.empty(0)

    def result(self, pooled: Moments, own: Moments) -> tuple[Tensor, Tensor]:
        """Mean and population variance of all values."""
        return pooled.mean, pooled.var


class MeanEstimate:
    """Averages the unbiased batch variances, weighted by the batches' values."""

    def __init__(self, channels: int) -> None:
        self._variances = Moments.empty(channels)

    def add(self, rows: Rows) -> None:
        """Takes the variances of batches with at least two values."""
        many = rows.counts > 1
        variances = rows.unbiased()[many]
        self._variances = self._variances.merge(Moments.pool(rows.counts[many], variances, torch.zeros_like(variances)))

    def moments(self) -> Moments:
        """Moments of the batch variances."""
        return self._variances

    def result(self, pooled: Moments, own: Moments) -> tuple[Tensor, Tensor]:
        """Mean of all values and mean of the batch variances; not a number if every batch had a single value."""
        return pooled.mean, own.mean if own.count else torch.full_like(own.mean, torch.nan)


class EmaEstimate:
    """PyTorch's own exponential or cumulative average, continued from the present statistics.

    Ranks average on their own; then their averages are pooled by the law of total variance, by their values.

    Args:
        mean: the layer's present running mean, (C,), float64 on the CPU.
        var: its running variance, likewise.
        batches: how many batches these stand for.
        momentum: h; None for a cumulative average that counts on from the layer's `num_batches_tracked`.
    """

    def __init__(self, mean: Tensor, var: Tensor, batches: int, momentum: float | None) -> None:
        self._mean, self._var = mean, var
        self._momentum = momentum
        self._batches = batches
        self._values = 0.0

    def add(self, rows: Rows) -> None:
        """Moves the averages by each batch in turn; a batch of one value moves only the mean."""
        for n, mean, var in zip(rows.counts.tolist(), rows.means, rows.unbiased(), strict=True):
            self._batches += 1
            self._values += n
            weight = 1 / self._batches if self._momentum is None else self._momentum
            self._mean = torch.lerp(self._mean, mean, weight)
            self._var = torch.lerp(self._var, var, weight) if n > 1 else self._var

    def moments(self) -> Moments:
        """The averages, as if of all values seen."""
        return Moments(self._values, self._mean, self._var * self._values)

    def result(self, pooled: Moments, own: Moments) -> tuple[Tensor, Tensor]:
        """The averages of all ranks, pooled."""
        return own.mean, own.var
