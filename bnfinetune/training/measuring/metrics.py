"""Classification metrics of one pass over a split, whatever its batches and ranks.

Where an image has one class, they come from exact counts that add up. Where it has several (`data.task=multilabel`),
mean average precision ranks the images by their scores, all of which are kept until the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

_ECE_BINS = 15
MOST_CLASSES = 256
"""Classes up to which a confusion matrix is counted: the rest of the metrics is linear in them."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What one pass over a split measured; `ClassMetrics` or `LabelMetrics`, as `data.task` says.

    `per_class` is by class number, fractions; None of a class without an image where it is not defined.
    """

    images: int
    loss: float
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...] = ()
    thresholds: tuple[float, ...] = ()

    def scalars(self) -> dict[str, float]:
        """The metrics that are one number each."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, int | float)}

    @property
    def headline(self) -> str:
        """The one that counts most, in words."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ClassMetrics(Metrics):
    """Of images of one class each.

    `top1`, `top5`, `macro_f1`, `ece` and the entries of `per_class` (top-1) are fractions; `loss` is the mean
    cross-entropy without label smoothing. `confusion[i][j]` counts images of class i that were predicted as class j; it
    is empty where it was not asked for, or beyond `MOST_CLASSES`.
    """

    top1: float
    top5: float
    macro_f1: float
    ece: float

    @property
    def headline(self) -> str:
        return f"top-1 {self.top1:.1%}"


@dataclass(frozen=True, kw_only=True)
class LabelMetrics(Metrics):
    """Of images of any number of classes each.

    `map` is the mean of `per_class`, the average precision of each class that has an image:
    sum over its images, the likeliest first, of (recall_n - recall_(n-1)) * precision_n, as scikit-learn computes it.
    `macro_f1` (mean over classes that are present or predicted) and `micro_f1` (of all decisions together) hold where a
    class is predicted from `thresholds` on, a probability for each. `loss` is the binary cross-entropy, the mean over
    images and classes, without label smoothing.
    """

    map: float
    macro_f1: float
    micro_f1: float

    @property
    def headline(self) -> str:
        return f"mAP {self.map:.1%}"


def restored_metrics(values: Mapping[str, Any]) -> Metrics:
    """What `dataclasses.asdict` made values of."""
    return (LabelMetrics if "map" in values else ClassMetrics)(**values)


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

    def metrics(self) -> ClassMetrics:
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
        return ClassMetrics(
            images=images,
            top1=float(hits.sum()) / total,
            top5=float(first_five) / total,
            macro_f1=float(f1.mean()) if len(f1) else 0.0,
            ece=float(gap) / total,
            loss=float(sums[-1]) / total,
            per_class=tuple((hits / actual.clamp(min=1)).tolist()),
            confusion=tuple(map(tuple, parts[6].reshape(n, n).tolist())) if self._pairs else (),
        )


class LabelTally:
    """The scores and labels of a split, kept on the CPU: 5 bytes for each image and class, and some 30 at the end.

    Args:
        num_classes: Outputs of the network.
        thresholds: Probabilities from which on each class is predicted; None: those of the best F1 on the very images.
    """

    def __init__(self, num_classes: int, thresholds: Sequence[float] | None = None) -> None:
        self._thresholds = thresholds
        self._logits = [torch.empty(0, num_classes)]
        self._labels = [torch.empty(0, num_classes, dtype=torch.uint8)]

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Keep one batch: `logits` (B, classes) of any float type, `labels` (B, classes) of 0 and 1."""
        self._logits.append(logits.float().cpu())
        self._labels.append(labels.to("cpu", torch.uint8))

    def merge(self) -> None:
        """Gather those of all ranks, in rank order; a rank may have none."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, (torch.cat(self._logits), torch.cat(self._labels)))
        self._logits, self._labels = map(list, zip(*shares, strict=True))

    def metrics(self) -> LabelMetrics:
        """The metrics of everything kept so far."""
        logits, labels = torch.cat(self._logits).double(), torch.cat(self._labels)
        loss = float(F.binary_cross_entropy_with_logits(logits, labels.double()))
        scores, truth = logits.sigmoid().nan_to_num(0.0).numpy(), labels.numpy().astype(bool)
        found = [_average_precision(truth[:, n], scores[:, n]) for n in range(truth.shape[1])]
        precisions = [precision for precision, _ in found if precision is not None]
        thresholds = [cut for _, cut in found] if self._thresholds is None else self._thresholds
        predicted = scores >= np.array(thresholds)
        hits, decisions = (truth & predicted).sum(0), truth.sum(0) + predicted.sum(0)
        present = decisions > 0
        return LabelMetrics(
            images=len(truth),
            loss=loss,
            map=float(np.mean(precisions)) if precisions else 0.0,
            macro_f1=float((2 * hits[present] / decisions[present]).mean()) if present.any() else 0.0,
            micro_f1=float(2 * hits.sum() / max(decisions.sum(), 1)),
            per_class=tuple(precision for precision, _ in found),
            thresholds=tuple(thresholds),
        )


def _average_precision(truth: NDArray[np.bool_], scores: NDArray[np.float64]) -> tuple[float | None, float]:
    """The average precision of one class, and the threshold of its best F1; None and 1/2 of a class without an image.

    The threshold lies half-way to the next lower score: rounding, on another device say, then changes no decision.
    """
    if not truth.any():
        return None, 0.5
    from sklearn.metrics import precision_recall_curve  # takes two seconds to import

    precision, recall, cuts = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    below = cuts[best - 1] if best else 0.0
    return float(-(np.diff(recall) * precision[:-1]).sum()), float((below + cuts[best]) / 2)


def new_tally(
    num_classes: int,
    device: torch.device,
    *,
    multilabel: bool,
    confusion: bool = True,
    thresholds: Sequence[float] | None = None,
) -> Tally | LabelTally:
    """What a pass over a split is counted in; each kind takes what concerns it."""
    return LabelTally(num_classes, thresholds) if multilabel else Tally(num_classes, device, confusion=confusion)
