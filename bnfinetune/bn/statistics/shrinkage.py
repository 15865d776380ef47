"""Shrinkage: new population statistics held back by those that the network had, as by a prior of N samples.

With n samples, `w = n / (N + n)`, stored `m_s, v_s` and the data's own `m_t, v_t`, each (C,),

    m = (1 - w) m_s + w m_t
    v = (1 - w) v_s + w v_t + w (1 - w) (m_s - m_t)^2

are the mean and variance of a mixture of both populations. N = 0 takes the data's, infinity keeps the stored. Since
`v >= (1 - w) v_s`, a channel that the data leaves nearly constant is never amplified more than `1 / sqrt(1 - w)` times
as much as before; without a prior its noise becomes a signal.

Sources: Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", 2020, for
the weight (there the variances alone are averaged, without the last term).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from torch import Tensor

from bnfinetune.bn.statistics.batches import find_images
from bnfinetune.bn.statistics.collectives import ProcessGroup, share
from bnfinetune.bn.statistics.layer_statistics import NewStatistics
from bnfinetune.bn.statistics.moments import mixture
from bnfinetune.errors import StatisticsError

Stored = Mapping[str, tuple[Tensor, Tensor]]

THROUGH: Final = ("batch", "mixture")
COLLAPSED: Final = 0.01
"""Below this share of its stored variance, a channel is nearly constant on the data: its noise grows tenfold."""


def check_prior(prior: float, through: str, variance: str) -> None:
    """Refuses what is no prior, or has no use for one.

    Raises:
        StatisticsError: it is so.
    """
    if not prior >= 0:
        raise StatisticsError(f"prior={prior}; give a number of samples, 0 for none, math.inf to keep what is stored")
    if variance == "ema" and prior:
        raise StatisticsError("prior has no meaning with variance='ema', which starts from the stored; use 'pooled'")
    if through not in THROUGH:
        raise StatisticsError(f"through={through!r}; choose one of {', '.join(THROUGH)}")


def data_share(prior: float, samples: int) -> float:
    """The weight w of n samples of data beside a prior of N: 1 without a prior, 0 with an infinite one.

    Raises:
        StatisticsError: nobody has counted the samples that a prior is to be weighed against.
    """
    if not prior:
        return 1.0
    if not samples:
        raise StatisticsError("prior needs batches with tensors whose first dimension counts samples; use prior=0")
    return 0.0 if math.isinf(prior) else samples / (prior + samples)


def prior_of(share: float, samples: int) -> float:
    """The prior N beside which n samples have a weight."""
    return samples * (1 - share) / share if share else math.inf


def samples_in(data: Iterable[Any], num_samples: int | None, group: ProcessGroup = None) -> int:
    """How many samples a pass will read on all ranks, before it reads any.

    Raises:
        StatisticsError: only reading the data would tell.
    """
    if num_samples is not None:
        return num_samples

    def count() -> tuple[float]:
        if not isinstance(data, list | tuple):
            raise StatisticsError(
                "how much a prior weighs must be known before the data is read; pass num_samples=, or a list of batches"
            )
        found = [find_images(batch) for batch in data]
        return (sum(images.samples for images in found if images is not None),)

    return int(sum(samples for (samples,) in share(count, 1, group)))


def shrink(own: Mapping[str, NewStatistics], stored: Stored, share: float) -> dict[str, NewStatistics]:
    """The data's own statistics, held back by the stored.

    Args:
        own: those of the data alone, by layer.
        stored: mean and variance (C,) of each, float64 on the CPU.
        share: the weight w of the data.
    """
    if share == 1:
        return dict(own)
    mixed = {name: mixture(*stored[name], each.mean, each.var, share) for name, each in own.items()}
    return {name: each._replace(mean=mixed[name][0], var=mixed[name][1]) for name, each in own.items()}


def collapsed_channels(var: Tensor, new: Tensor) -> tuple[int, ...]:
    """Channels whose variance on the data is below `COLLAPSED` of the stored one.

    Args:
        var: stored variance (C,).
        new: the data's own (C,).
    """
    return tuple((new < COLLAPSED * var).nonzero().flatten().tolist())
