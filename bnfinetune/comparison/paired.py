"""How sure a difference between two cells is: paired over seeds and images.

Both cells see the same images and start from the same seeds. With `d_si` the difference of their outcomes (right or
not) under seed s on image i, the estimate is the mean D over both. Two things make it uncertain, the draw of seeds and
that of images, and

    Var(D) <= A + B,   A = var_s(mean_i d_si) / S,   B = var_i(mean_s d_si) / N,

where what a seed and an image do together is counted in both, on the safe side. Where every seed holds out images of
its own, A holds the draw of images too, and B is 0. Each part has a reach of its own, Student's with its degrees of
freedom, and the interval is (Howe 1974, "Approximate Confidence Limits on the Mean of X + Y Where X and Y Are Two
Tabled Independent Random Variables")

    D +- sqrt(t_{S-1}^2 A + t_{N-1}^2 B).

It is wide for two seeds, since two values tell little of how seeds scatter. Resampling seeds and images (a bootstrap)
gives shorter intervals that are wrong: where seeds matter most, stated 95 % cover 67 to 83 % with 2 to 5 seeds, those
above 94 to 96 (`python -m tests.bench intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Outcome = NDArray[np.float64]
"""Of one seed: right (1) or not (0) for each image, (N,)."""


class Difference(NamedTuple):
    """How far one cell is ahead of another.

    Attributes:
        mean: Share of images, such as 0.02 for two points.
        low: Bound of its interval.
        high: The other.
        seeds: That it was paired over; of one seed, the interval is over images alone.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def is_behind(self) -> bool:
        """Whether it surely is below 0."""
        return self.high < 0


def paired_difference(
    first: Sequence[Outcome], second: Sequence[Outcome], *, same_images: bool, level: float = 0.95
) -> Difference:
    """The mean difference of two cells' outcomes, with its interval.

    Args:
        first: One cell's, by seed.
        second: The other's, under the same seeds and on the same images.
        same_images: Whether all seeds were measured on the same images.
        level: That the interval is to cover.
    """
    means, images = _parts(first, second, same_images)
    mean, reach = float(means.mean()), _total_reach(means, images, len(means), level)
    return Difference(mean, mean - reach, mean + reach, len(means))


def expected_reach(
    first: Sequence[Outcome], second: Sequence[Outcome], *, same_images: bool, seeds: int, level: float = 0.95
) -> float:
    """Half the length that the interval of `paired_difference` would have with more seeds that scatter as these do.

    Args:
        first: One cell's outcomes, of two seeds or more.
        second: The other's.
        same_images: Whether all seeds were measured on the same images, which then bound it: as seeds grow, it falls to
            what the images alone leave open.
        seeds: How many there would be.
        level: That the interval is to cover.
    """
    return _total_reach(*_parts(first, second, same_images), seeds, level)


def _parts(
    first: Sequence[Outcome], second: Sequence[Outcome], same_images: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Differences by seed and, where images are a draw of their own, by image."""
    apart = [one - other for one, other in zip(first, second, strict=True)]
    means = np.array([each.mean() for each in apart])
    return means, np.mean(apart, axis=0) if same_images or len(means) == 1 else None


def _total_reach(means: NDArray[np.float64], images: NDArray[np.float64] | None, seeds: int, level: float) -> float:
    parts = [_reach(means, seeds, level)] if len(means) > 1 else []
    if images is not None:
        parts.append(_reach(images, len(images), level))
    return math.hypot(*parts)


def _reach(values: NDArray[np.float64], count: int, level: float) -> float:
    """Half the length of Student's interval of the mean of so many values that scatter as these do."""
    if len(values) < 2:
        return math.inf
    quantile = float(student.ppf((1 + level) / 2, count - 1))
    return quantile * float(values.std(ddof=1)) / math.sqrt(count)


def still_racing(
    outcomes: dict[str, list[Outcome]], *, same_images: bool, rounds: int, error: float = 0.05
) -> dict[str, Difference]:
    """Cells that are not surely behind the leader, with their difference to it.

    The chance that the best of the cells ever leaves is at most `error`: it is shared among the comparisons with each
    possible leader and among the rounds (Bonferroni).

    Args:
        outcomes: By cell and seed.
        same_images: Whether all seeds were measured on the same images.
        rounds: After how many rounds cells may leave.
        error: That chance.
    """
    leader = max(outcomes, key=lambda name: float(np.mean([each.mean() for each in outcomes[name]])))
    level = 1 - 2 * error / (max(len(outcomes) - 1, 1) * max(rounds, 1))  # one side of the interval decides
    found = {
        name: paired_difference(mine, outcomes[leader], same_images=same_images, level=level)
        for name, mine in outcomes.items()
    }
    return {name: difference for name, difference in found.items() if not difference.is_behind}
