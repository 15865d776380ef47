"""The loss that training starts from, read off the gradient that comes back to the scores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_ROUNDING = 0.02  # of a gradient in half precision
_SMOOTHED = 0.25  # most that a label is smoothed by
_SURE = 0.999  # a score from which on a right answer may leave no gradient


class FirstLoss(NamedTuple):
    """Cross entropy of the first training batch.

    Attributes:
        value: its mean over the images, in nats.
        error: standard error of that.
        classes: C.
    """

    value: float
    error: float
    classes: int

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
    if counted.sum() < 2 or (gradient.sum(1).abs() > _ROUNDING * size.amax()).any():
        return None
    if scores.shape[1] == 2 and (gradient.gather(1, answers[:, None]) > 0).all():
        return None  # all wrong, or all surer than smoothed labels: with two classes these look the same
    wrongest = int(size.argmax())
    scale = 2 * (1 - chances[wrongest, gradient[wrongest].argmin()]) / size[wrongest]
    shares, labels = (chances - scale * gradient)[counted].max(1)
    if (shares - 1).abs().max() > _SMOOTHED:
        return None
    losses = F.cross_entropy(scores[counted], labels, reduction="none")
    deviation, mean = torch.std_mean(losses)
    return FirstLoss(float(mean), float(deviation) / math.sqrt(len(losses)), scores.shape[1])
