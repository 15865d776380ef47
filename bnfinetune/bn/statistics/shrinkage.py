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
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from bnfinetune.bn.statistics.layer_statistics import NewStatistics
from bnfinetune.errors import StatisticsError

Stored = Mapping[str, tuple[Tensor, Tensor]]

COLLAPSED: Final = 0.01
"""Below this share of its stored variance, a channel is nearly constant on the data: its noise grows tenfold."""


class PriorSearch:
    """Finds a prior by trying a few: `precise_bn(model, data, prior=PriorSearch(score))`.

    The pass over the data is made once; each prior only costs its score.

    Args:
        score: how good the model is with the statistics that it holds now; larger is better. It is called in
            evaluation mode, and gives the same number on all ranks.
        shares: the weights w of the data to try, each from 0 to 1, of which w = 1 is left to those who ask for it:
            nothing bounds what a nearly constant channel then amplifies.

    Attributes:
        scores: score by share, in the order of `shares`.
        prior: N of the best; of equals, the largest.

    Raises:
        StatisticsError: no share, or one out of bounds.
    """

    def __init__(self, score: Callable[[], float], shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.99)) -> None:
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise StatisticsError(f"shares={tuple(shares)}; give weights of the data from 0 to 1, such as 0.5")
        self.score, self.shares = score, sorted(set(shares))
        self.scores: dict[float, float] = {}
        self.prior = math.inf

    def choose(self, samples: int, hold: Callable[[float], None]) -> float:
        """Tries every share.

        Args:
            samples: n.
            hold: lets the model hold the statistics under a prior.

        Returns:
            The prior that scored best.

        Raises:
            StatisticsError: no score is a number.
        """
        for share in self.shares:
            prior = _prior(share, samples)
            hold(prior)
            self.scores[share] = self.score()
        known = [share for share in self.shares if not math.isnan(self.scores[share])]
        if not known:
            raise StatisticsError("no prior gave a score that is a number; look for damaged weights or inputs")
        self.prior = _prior(max(known, key=lambda share: self.scores[share]), samples)  # max gives the first of equals
        return self.prior


Prior = float | PriorSearch


def require_prior(prior: Prior) -> None:
    """Refuses what is no prior.

    Raises:
        StatisticsError: below 0, or not a number.
    """
    if not isinstance(prior, PriorSearch) and not prior >= 0:
        raise StatisticsError(f"prior={prior!r}; give a number of samples, 0 for none, math.inf to keep what is stored")


def settle(
    prior: Prior,
    own: Mapping[str, NewStatistics],
    stored: Stored,
    samples: int,
    hold: Callable[[Mapping[str, NewStatistics]], None],
) -> tuple[float, dict[str, NewStatistics]]:
    """What layers get under a prior.

    Args:
        prior: N, or a search for it.
        own: the statistics of the data alone, by layer.
        stored: mean and variance (C,) of each, float64 on the CPU.
        samples: n.
        hold: lets the model hold statistics while a search scores it.

    Returns:
        The weight w of the data: 1 without a prior, 0 with an infinite one. And the statistics.

    Raises:
        StatisticsError: nobody has counted the samples that a prior is to be weighed against.
    """
    if not samples and prior != 0:
        raise StatisticsError("prior needs batches with tensors whose first dimension counts samples; use prior=0")
    if isinstance(prior, PriorSearch):
        prior = prior.choose(samples, lambda tried: hold(_shrink(own, stored, _share(tried, samples))))
    share = _share(prior, samples)
    return share, _shrink(own, stored, share)


def collapsed_channels(var: Tensor, new: Tensor) -> tuple[int, ...]:
    """Channels whose variance on the data is below `COLLAPSED` of the stored one.

    Args:
        var: stored variance (C,).
        new: the data's own (C,).
    """
    return tuple((new < COLLAPSED * var).nonzero().flatten().tolist())


def _prior(share: float, samples: int) -> float:
    return samples * (1 - share) / share if share else math.inf


def _share(prior: float, samples: int) -> float:
    if not prior:
        return 1.0
    return 0.0 if math.isinf(prior) else samples / (prior + samples)


def _shrink(own: Mapping[str, NewStatistics], stored: Stored, share: float) -> dict[str, NewStatistics]:
    return dict(own) if share == 1 else {name: _mixture(*stored[name], each, share) for name, each in own.items()}


def _mixture(mean: Tensor, var: Tensor, own: NewStatistics, share: float) -> NewStatistics:
    between = share * (1 - share) * (mean - own.mean).square()
    return own._replace(mean=torch.lerp(mean, own.mean, share), var=torch.lerp(var, own.var, share) + between)
