"""Classification metrics from exact counts that add up over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_ECE_BINS = 15


@dataclass(frozen=True)
class Metrics:
    """What one pass over a split measured.

    `top1`, `top5`, `macro_f1`, `ece` and the entries of `per_class` are fractions; `loss` is the mean cross-entropy
    without label smoothing. `confusion[i][j]` counts images of class i that were predicted as class j.
    """

    images: int
    top1: float
    top5: float
    macro_f1: float
    ece: float
    loss: float
    per_class: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]

    def scalars(self) -> dict[str, float]:
        """The metrics that are one number each."""
        return {
            "images": self.images,
            "top1": self.top1,
            "top5": self.top5,
            "macro_f1": self.macro_f1,
            "ece": self.ece,
            "loss": self.loss,
        }


class Tally:
    """Running counts over a split of `num_classes` classes; `merge` adds up what the ranks have counted.

    Everything is kept in one float64 vector (counts are exact in it up to 2**53), so that ranks exchange one tensor.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._total = torch.zeros(num_classes**2 + 3 * _ECE_BINS + 2, dtype=torch.float64)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: `logits` (B, classes) of any float type, `labels` (B,) int64."""
        logits = logits.float()
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        confusion = torch.bincount(labels * self.num_classes + predicted, minlength=self.num_classes**2)
        hit = (predicted == labels).float()
        slot = (confidence * _ECE_BINS).long().clamp_(0, _ECE_BINS - 1)  # what is no number counts in the first
        bins = logits.new_zeros(3, _ECE_BINS)  # images, confidence, hits
        bins.index_add_(1, slot, torch.stack([torch.ones_like(hit), confidence, hit]))
        first_five = logits.topk(min(5, self.num_classes), dim=1).indices
        sums = [F.cross_entropy(logits, labels, reduction="sum"), (first_five == labels[:, None]).sum().float()]
        parts = [confusion, bins.flatten(), torch.stack(sums)]
        self._total += torch.cat([part.to("cpu", torch.float64) for part in parts])

    def merge(self) -> None:
        """Add up the counts of all ranks, in rank order so that every rank gets the same bits."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        shares: list[Tensor | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, self._total)
        self._total = torch.stack([share for share in shares if share is not None]).sum(dim=0)

    def metrics(self) -> Metrics:
        """The metrics of everything counted so far."""
        n = self.num_classes
        confusion = self._total[: n * n].reshape(n, n)
        bins = self._total[n * n : -2].reshape(3, _ECE_BINS)
        loss, top5 = self._total[-2:].tolist()
        images = max(int(confusion.sum()), 1)
        hits, actual, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
        # a class that is neither present nor predicted has no F1, and does not count in the mean
        present = (actual + predicted) > 0
        f1 = 2 * hits[present] / (actual + predicted)[present]
        gap = (bins[1] - bins[2]).abs().sum()  # sum over bins of images * |confidence - accuracy|
        return Metrics(
            images=int(confusion.sum()),
            top1=float(hits.sum()) / images,
            top5=top5 / images,
            macro_f1=float(f1.mean()) if len(f1) else 0.0,
            ece=float(gap) / images,
            loss=loss / images,
            per_class=tuple((hits / actual.clamp(min=1)).tolist()),
            confusion=tuple(tuple(int(count) for count in row) for row in confusion.tolist()),
        )
