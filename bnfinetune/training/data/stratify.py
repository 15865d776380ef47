"""Parts of a data set that keep the share of every class, as a function of the labels and a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfinetune.training.data.seeding import derive_seed

Indices = NDArray[np.int64]
Labels = NDArray[np.integer[Any]]
"""Class numbers, of shape `(rows,)`, or 0 and 1 for any number of labels per row, of shape `(rows, classes)`."""

_HOLD_OUT, _SUBSET = 1, 2  # streams of random draws


def class_counts(labels: Labels, classes: int = 0) -> Indices:
    """Rows of each class, of which there are at least `classes`."""
    return labels.sum(0, dtype=np.int64) if labels.ndim == 2 else np.bincount(labels, minlength=classes)


def hold_out(labels: Labels, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Divide rows into those to train on and those held out.

    The number held out is `fraction * len(labels)`, rounded; each class gives its share, rounded up or down
    (largest remainders first), and keeps at least one row to train on. Of several labels per row, this holds as far as
    can be.

    Args:
        labels: Of every row.
        fraction: Share to hold out, strictly between 0 and 1.
        seed: Seed of the choice.

    Returns:
        Sorted row numbers to train on, and sorted row numbers held out.
    """
    if labels.ndim == 2:
        kept = _balanced(labels, len(labels) - round(fraction * len(labels)), derive_seed(seed, _HOLD_OUT))
        return kept, np.setdiff1d(np.arange(len(labels)), kept, assume_unique=True)
    counts = np.bincount(labels)
    quotas = _apportion(fraction * counts, round(fraction * len(labels)), most=np.maximum(counts - 1, 0))
    held = _draw(labels, quotas, derive_seed(seed, _HOLD_OUT))
    return np.setdiff1d(np.arange(len(labels)), held, assume_unique=True), held


def subset(labels: Labels, size: int, seed: int) -> Indices:
    """Choose `size` rows in which every class has its share, and at least one row; of several labels, as far as can be.

    Args:
        labels: Of every row.
        size: Rows to choose, from the number of classes present to the number of rows.
        seed: Seed of the choice.

    Returns:
        Sorted row numbers.
    """
    if labels.ndim == 2:
        return _balanced(labels, size, derive_seed(seed, _SUBSET))
    counts = np.bincount(labels)
    share = np.maximum(counts * (size / len(labels)), np.minimum(counts, 1))
    quotas = _apportion(share, size, most=counts)
    while quotas.sum() > size:  # rare classes were rounded up to one row: the largest give these back
        quotas[np.argmax(quotas)] -= 1
    return _draw(labels, quotas, derive_seed(seed, _SUBSET))


def _balanced(labels: Labels, size: int, seed: int) -> Indices:
    """Sorted numbers of `size` rows with a share of every label, by iterative stratification.

    The label with the fewest rows left comes first; each of its rows goes where that label is wanted most, or else to
    where there is room. Whatever `size` is, the chosen rows want one of every label.

    Source: Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011.

    Args:
        labels: Of 0 and 1, of shape `(rows, labels)`.
        size: Rows to choose.
        seed: Seed of the choice.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    room = np.array([len(labels) - size, size])
    left = class_counts(labels)
    wanted = np.outer(room / len(labels), left)
    wanted[1] = np.maximum(wanted[1], 1)
    part = np.full(len(labels), -1)
    while left.any():
        label = int(np.where(left > 0, left, len(labels) + 1).argmin())
        for row in order[(labels[order, label] > 0) & (part[order] < 0)]:
            chosen = int(wanted[1, label] >= wanted[0, label])
            chosen = chosen if room[chosen] else 1 - chosen
            part[row] = chosen
            room[chosen] -= 1
            wanted[chosen] -= labels[row]
            left -= labels[row]
    part[order[part[order] < 0]] = np.repeat([0, 1], room)  # rows without labels
    return np.flatnonzero(part)


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


def _draw(labels: Labels, quotas: Indices, seed: int) -> Indices:
    """Sorted row numbers, `quotas[c]` of them drawn from the rows of class c."""
    rng = np.random.default_rng(seed)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    rows = [rng.permutation(members)[:quota] for members, quota in zip(by_class, quotas, strict=True)]
    return np.sort(np.concatenate(rows))
