"""Simulated outcomes of two cells, whose true difference is known."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Outcomes = list[NDArray[np.float64]]


def simulated(
    rng: np.random.Generator, *, seeds: int, images: int, gap: float = 0.0, scatter: float = 0.3, taste: float = 0.0
) -> tuple[Outcomes, Outcomes]:
    """Right (1) or not (0) for each image, by seed, of two cells.

    Args:
        rng: of all draws.
        seeds: how many.
        images: how many, of one difficulty each.
        gap: how much better the first is, in log odds, as all else.
        scatter: standard deviation of a seed's effect.
        taste: of the images that one cell likes and the other dislikes.
    """
    difficulty = 1.2 + 1.5 * rng.normal(size=images)
    liking = taste * rng.normal(size=images) if taste else np.zeros(images)

    def one(ahead: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
        for _ in range(seeds):
            odds = difficulty + ahead + scatter * rng.normal() + 0.3 * rng.normal(size=images)
            yield (rng.random(images) < 1 / (1 + np.exp(-odds))).astype(float)

    return list(one(gap + liking)), list(one(-liking))
