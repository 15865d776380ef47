"""Whether data comes sorted by class, which no look at activations can tell before the class changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

_SAME = 0.9


class LabelOrder:
    """Follows the labels of batches.

    Data counts as sorted as long as batches are (almost) of one class each and no class has come back after another:
    then what has been seen says nothing about the classes to come.
    """

    def __init__(self) -> None:
        self.seen = False
        self._classes: set[int] = set()
        self._last: int | None = None
        self._runs = 0
        self._batches = 0
        self._dominance = 0.0

    def add(self, labels: Tensor) -> None:
        """Takes the labels (N,) of the next batch."""
        classes, counts = torch.unique(labels.detach().cpu(), return_counts=True)
        leader = int(classes[counts.argmax()])
        self.seen = True
        self._classes.update(classes.tolist())
        self._runs += leader != self._last
        self._last = leader
        self._batches += 1
        self._dominance += float(counts.max() / counts.sum())

    @property
    def is_sorted(self) -> bool:
        """Whether the batches so far look sorted by class."""
        return self.seen and self._dominance > _SAME * self._batches and self._runs <= len(self._classes)


def is_read_in_stored_order(data: Any) -> bool:
    """Whether a loader reads its data set from first to last, so that stored order is batch order."""
    sampler = getattr(data, "sampler", None)
    while isinstance(sampler, torch.utils.data.BatchSampler):
        sampler = sampler.sampler
    return isinstance(sampler, SequentialSampler)
