"""Parts of a data set that keep the share of every class, as a function of the labels and a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfinetune.training.data.seeding import derive_seed

Indices = NDArray[np.int64]

_HOLD_OUT, _SUBSET = 1, 2  # streams of random draws


def hold_out(labels: Indices, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Divide rows into those to train on and those held out.

    The number held out is `fraction * len(labels)`, rounded; each class gives its share, rounded up or down
    (largest remainders first), and keeps at least one row to train on.

    Args:
        labels: Class of every row, of shape `(rows,)`.
        fraction: Share to hold out, strictly between 0 and 1.
        seed: Seed of the choice.

    Returns:
        Sorted row numbers to train on, and sorted row numbers held out.
    """
    counts = np.bincount(labels)
    quotas = _apportion(fraction * counts, round(fraction * len(labels)), most=np.maximum(counts - 1, 0))
    held = _draw(labels, quotas, derive_seed(seed, _HOLD_OUT))
    return np.setdiff1d(np.arange(len(labels)), held, assume_unique=True), held


def subset(labels: Indices, size: int, seed: int) -> Indices:
    """Choose `size` rows in which every class has its share, and at least one row.

    Args:
        labels: Class of every row, of shape `(rows,)`.
        size: Rows to choose, from the number of classes present to the number of rows.
        seed: Seed of the choice.

    Returns:
        Sorted row numbers.
    """
    counts = np.bincount(labels)
    share = np.maximum(counts * (size / len(labels)), np.minimum(counts, 1))
    quotas = _apportion(share, size, most=counts)
    while quotas.sum() > size:  # rare classes were rounded up to one row: the largest give these back
        quotas[np.argmax(quotas)] -= 1
    return _draw(labels, quotas, derive_seed(seed, _SUBSET))


def _apportion(shares: NDArray[np.floating[Any]], total: int, most: Indices) -> Indices:
    """Round shares to whole numbers of at most `most`, handing what is left of `total` to the largest remainders."""
    quotas: Indices = np.minimum(np.floor(shares + 1e-9).astype(np.int64), most)
    remainders = shares - quotas
    for place in np.argsort(-remainders, kind="stable"):
        if quotas.sum() >= total:
            break
        if remainders[place] > 0 and quotas[place] < most[place]:
            quotas[place] += 1
    return quotas


def _draw(labels: Indices, quotas: Indices, seed: int) -> Indices:
    """Sorted row numbers, `quotas[c]` of them drawn from the rows of class c."""
    rng = np.random.default_rng(seed)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    rows = [rng.permutation(members)[:quota] for members, quota in zip(by_class, quotas, strict=True)]
    return np.sort(np.concatenate(rows))
