"""The loss that training starts from, read off the gradient that comes back to the scores."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

_ROUNDING = 0.02  # of a gradient in half precision
_SMOOTHED = 0.25  # most that a label is smoothed by
_SURE = 0.999  # a score from which on a right answer may leave no gradient


class FirstLoss(NamedTuple):
    """Cross entropy of the first training batch.

    Attributes:
        value: its mean over the images, in nats.
        blind: the same, were each image of every class in turn: what these scores cost if they know nothing.
        blind_error: standard error of that.
        apart_error: standard error of the difference of the two, paired over images.
        classes: C.
    """

    value: float
    blind: float
    blind_error: float
    apart_error: float
    classes: int

    @property
    def knows_nothing(self) -> bool:
        """Whether the true labels fare no better under these scores than any others, by two standard errors."""
        return self.blind - self.value < 2 * self.apart_error

    @property
    def chance(self) -> float:
        """The cross entropy of equal scores: ln C."""
        return math.log(self.classes)


def first_loss(scores: Tensor, gradient: Tensor) -> FirstLoss | None:
    """The cross entropy that a gradient tells of; None where it is not that of a cross entropy.

    The gradient of cross entropy by the scores is softmax minus labels over some a, such as the number of images: it
    sums to 0 over the classes. The image with the largest gradient has the wrongest answer, so that its lowest value is
    at its label and tells a; then every label is softmax minus a times the gradient. None too where these are no labels
    of one class, smoothed or not, as of mixed images.

    Args:
        scores: of shape (N, C), C of 2 or more.
        gradient: of the loss by the scores, of the same shape.
    """
    scores, gradient = scores.detach().float(), gradient.detach().float()
    if not (scores.isfinite().all() and gradient.isfinite().all()):
        return None
    chances = scores.softmax(1)
    sure, answers = chances.max(1)
    size = gradient.abs().sum(1)
    counted = (size > 0) | (sure > _SURE)  # others are ignored by the loss
    if not size.any() or counted.sum() < 2 or (gradient.sum(1).abs() > _ROUNDING * size.amax()).any():
        return None
    if scores.shape[1] == 2 and (gradient.gather(1, answers[:, None]) > 0).all():
        return None  # all wrong, or all surer than smoothed labels: with two classes these look the same
    wrongest = int(size.argmax())
    scale = 2 * (1 - chances[wrongest, gradient[wrongest].argmin()]) / size[wrongest]
    shares, labels = (chances - scale * gradient)[counted].max(1)
    if (shares - 1).abs().max() > _SMOOTHED:
        return None
    scores = scores[counted]
    losses = F.cross_entropy(scores, labels, reduction="none")
    blind = scores.logsumexp(1) - scores.mean(1)
    return FirstLoss(
        value=float(losses.mean()),
        blind=float(blind.mean()),
        blind_error=_error(blind),
        apart_error=_error(blind - losses),
        classes=scores.shape[1],
    )


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return float(values.std()) / math.sqrt(len(values))
