"""Which prior: a few are tried, and the one under which the network does best is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from torch import nn

from bnfinetune.bn.layers import unwrap
from bnfinetune.bn.put_back import kept_buffers
from bnfinetune.bn.statistics.precise import evaluation_mode, precise_bn
from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.bn.statistics.shrinkage import prior_of, samples_in
from bnfinetune.errors import StatisticsError

SHARES: Final = (0.1, 0.25, 0.5, 0.75, 0.99)
"""Weights of the data that are tried beside 0. With a weight of 1, nothing would bound what a channel amplifies."""


CHOICE: Final = 512
"""How many samples are enough to choose by, where they must be kept in memory."""


class PriorChoice(NamedTuple):
    """What a search has found.

    Attributes:
        share: weight w of the data's statistics; 0 keeps the stored ones.
        prior: N, in samples.
        scores: the score under each weight, in the order in which they were tried.
        report: of the pass that the model's statistics are from.
    """

    share: float
    prior: float
    scores: dict[float, float]
    report: PreciseBNReport


def choose_prior(
    model: nn.Module,
    data: Iterable[Any],
    score: Callable[[], float],
    *,
    shares: Sequence[float] = SHARES,
    every: bool = False,
    num_samples: int | None = None,
    **options: Any,
) -> PriorChoice:
    """Shrinks a model's statistics towards those of data as far as that makes the model better.

    0, the middle and the largest weight are tried, then those beside the best, each by a pass and a score; 0 keeps the
    statistics as they are stored, and wins if nothing beats it. Whatever fails, the model is bit for bit what it was.

    Args:
        model: as for `precise_bn`.
        data: read once for each weight: a list of batches, or a loader with `num_samples`; not a generator.
        score: how good the model is with the statistics that it holds now; larger is better. It is called in
            evaluation mode, and gives the same number on all ranks.
        shares: weights w of the data, above 0 and at most 1.
        every: try every weight.
        num_samples: as for `precise_bn`.
        **options: others of `precise_bn`.

    Raises:
        StatisticsError: a weight out of bounds, data that can be read only once, a score that is no number, or a pass
            that failed.
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise StatisticsError(f"shares={tuple(shares)}; give weights of the data above 0 and at most 1, such as 0.5")
    if iter(data) is data:
        raise StatisticsError(
            "the data can be read only once, and choosing a prior reads it several times; pass a list"
        )
    net = unwrap(model)
    samples = samples_in(data, num_samples, options.get("process_group"))
    put_back = kept_buffers(net)
    scores: dict[float, float] = {}

    def estimate(share: float) -> tuple[PriorChoice, Callable[[], None]]:
        put_back()
        prior = prior_of(share, samples)
        report = precise_bn(net, data, prior=prior, through="mixture", num_samples=num_samples, **options)
        return PriorChoice(share, prior, scores, report), kept_buffers(net)

    ladder = sorted({0.0, *shares})
    hold: tuple[PriorChoice, Callable[[], None]] | None = None
    try:
        while (share := _next(ladder, scores, every=every)) is not None:
            found = estimate(share) if share else None
            value = _scored(net, score, share)
            if share and value > max(scores.values()):
                hold = found
            scores[share] = value
        choice, put_in = hold or estimate(0.0)  # whose pass is for its report alone
    except BaseException:
        put_back()
        raise
    put_in()
    return choice


def _next(ladder: Sequence[float], scores: dict[float, float], *, every: bool) -> float | None:
    """The weight to try next: the ends and the middle, then beside the best until both of its neighbours are known.

    Statistics that are far off leave all small weights equally useless, so that a climb from 0 alone would not start.
    """
    first = [0.0, ladder[len(ladder) // 2], ladder[-1]]
    left = [share for share in (ladder if every else first) if share not in scores]
    if left:
        return left[0]
    best = ladder.index(max(scores, key=lambda share: scores[share]))
    beside = ladder[max(best - 1, 0) : best + 2]
    return next((share for share in beside if share not in scores), None)


def _scored(net: nn.Module, score: Callable[[], float], share: float) -> float:
    with evaluation_mode(net):
        found = score()
    if math.isnan(found):
        raise StatisticsError(
            f"with a weight of {share:g} the score is not a number; look for damaged weights or inputs"
        )
    return found
