"""How often the intervals of a comparison cover the true difference, beside a bootstrap over seeds and images.

Two cells that are equally good, on simulated images of one difficulty each: an image is right with a probability that
depends on its difficulty, the cell's own taste, the seed, and both together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from bnfinetune.comparison.paired import paired_difference
from tests.comparison.simulation import Outcomes, simulated


def bootstrap(first: Outcomes, second: Outcomes, rng: np.random.Generator, draws: int = 200) -> tuple[float, float]:
    """The percentile interval of 95 %, with seeds and images drawn anew."""
    apart = np.array(first) - np.array(second)
    seeds, images = apart.shape
    means = [apart[rng.integers(0, seeds, seeds)][:, rng.integers(0, images, images)].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench intervals", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    print("seeds  images  scatter  ours   bootstrap   (stated: 95 %)")
    for scatter, images in ((0.15, 140), (0.6, 140), (0.6, 1000)):
        for seeds in (2, 3, 5):
            ours = theirs = 0
            for _ in range(options.runs):
                first, second = simulated(rng, seeds=seeds, images=images, scatter=scatter, taste=0.3)
                found = paired_difference(first, second, same_images=True)
                low, high = bootstrap(first, second, rng)
                ours, theirs = ours + (found.low <= 0 <= found.high), theirs + (low <= 0 <= high)
            print(f"{seeds:5}  {images:6}  {scatter:7}  {ours / options.runs:.1%}  {theirs / options.runs:.1%}")
