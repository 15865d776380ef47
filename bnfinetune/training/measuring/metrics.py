"""Classification metrics from exact counts that add up over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_ECE_BINS = 15
MOST_CLASSES = 256
"""Classes up to which a confusion matrix is counted: the rest of the metrics is linear in them."""


@dataclass(frozen=True)
class Metrics:
    """What one pass over a split measured.

    `top1`, `top5`, `macro_f1`, `ece` and the entries of `per_class` are fractions; `loss` is the mean cross-entropy
    without label smoothing. `confusion[i][j]` counts images of class i that were predicted as class j; it is empty
    where it was not asked for, or beyond `MOST_CLASSES`.
    """

    images: int
    top1: float
    top5: float
    macro_f1: float
    ece: float
    loss: float
    per_class: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...] = ()

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
    """Running counts over a split, kept where the logits are and read at the end.

    Counts are integers, and so the same in any order; the two sums that are not (loss, confidence) are float64, on the
    CPU where a device has none.

    Args:
        num_classes: Outputs of the network.
        device: Where the logits come from.
        confusion: Whether to count which class is taken for which, up to `MOST_CLASSES` classes.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", *, confusion: bool = True) -> None:
        self.num_classes = num_classes
        self._pairs = num_classes**2 if confusion and num_classes <= MOST_CLASSES else 0
        # by class: images, predictions, hits; by bin of confidence: images, hits; images among the first five; pairs
        sizes = (num_classes, num_classes, num_classes, _ECE_BINS, _ECE_BINS, 1, self._pairs)
        self._counts = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._parts = self._counts.split(sizes)
        exact = "cpu" if torch.device(device).type == "mps" else device
        self._sums = torch.zeros(_ECE_BINS + 1, dtype=torch.float64, device=exact)  # confidence by bin, loss

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: `logits` (B, classes) of any float type, `labels` (B,) int64."""
        logits = logits.float()
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        hit = (predicted == labels).long()
        slot = (confidence * _ECE_BINS).long().clamp_(0, _ECE_BINS - 1)  # what is no number counts in the first
        actual_of, predicted_of, hits_of, bin_of, bin_hits, first_five, pairs = self._parts
        for counts, index, values in (
            (actual_of, labels, torch.ones_like(hit)),
            (predicted_of, predicted, torch.ones_like(hit)),
            (hits_of, labels, hit),
            (bin_of, slot, torch.ones_like(hit)),
            (bin_hits, slot, hit),
        ):
            counts.index_add_(0, index, values)
        first_five += (logits.topk(min(5, self.num_classes), dim=1).indices == labels[:, None]).sum()
        if self._pairs:
            pairs.index_add_(0, labels * self.num_classes + predicted, torch.ones_like(hit))
        exact = self._sums.device
        self._sums[:-1].index_add_(0, slot.to(exact), confidence.to(exact).double())
        self._sums[-1] += F.cross_entropy(logits, labels, reduction="none").to(exact).double().sum()

    def merge(self) -> None:
        """Add up the counts of all ranks, in rank order so that every rank gets the same bits."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        torch.distributed.all_reduce(self._counts)
        shares = [torch.empty_like(self._sums) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(shares, self._sums)
        self._sums = torch.stack(shares).sum(dim=0)

    def metrics(self) -> Metrics:
        """The metrics of everything counted so far."""
        parts = [part.cpu() for part in self._parts]
        actual, predicted, hits, _, bin_hits, first_five = (part.double() for part in parts[:6])
        sums = self._sums.cpu()
        images = int(actual.sum())
        total = max(images, 1)
        # a class that is neither present nor predicted has no F1, and does not count in the mean
        present = (actual + predicted) > 0
        f1 = 2 * hits[present] / (actual + predicted)[present]
        gap = (sums[:-1] - bin_hits).abs().sum()  # sum over bins of images * |confidence - accuracy|
        n = self.num_classes
        return Metrics(
            images=images,
            top1=float(hits.sum()) / total,
            top5=float(first_five) / total,
            macro_f1=float(f1.mean()) if len(f1) else 0.0,
            ece=float(gap) / total,
            loss=float(sums[-1]) / total,
            per_class=tuple((hits / actual.clamp(min=1)).tolist()),
            confusion=tuple(map(tuple, parts[6].reshape(n, n).tolist())) if self._pairs else (),
        )
