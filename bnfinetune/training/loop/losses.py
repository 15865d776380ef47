"""What the loop minimises."""

from __future__ import annotations

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from bnfinetune.recipe import Recipe


class SigmoidCrossEntropy(nn.Module):
    """Binary cross-entropy of every class by itself, the mean over images and classes.

    With label smoothing s, a target t in [0, 1] becomes t (1 - s) + s / 2.

    Args:
        smoothing: Label smoothing.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of `logits` and `targets`, both of shape `(B, classes)`."""
        exact = torch.promote_types(logits.dtype, torch.float32)  # autocast gives half precision
        smoothed = targets.to(exact) * (1 - self.smoothing) + self.smoothing / 2
        return F.binary_cross_entropy_with_logits(logits.to(exact), smoothed)


def build_loss(recipe: Recipe, *, mixed: bool) -> nn.Module:
    """The training loss of a recipe.

    Args:
        recipe: `data.task` and `train.label_smoothing`.
        mixed: Whether targets are soft ones of mixup, which timm has smoothed where an image has one class.
    """
    smoothing = recipe.train.label_smoothing
    if recipe.is_multilabel:
        return SigmoidCrossEntropy(smoothing)
    return SoftTargetCrossEntropy() if mixed else nn.CrossEntropyLoss(label_smoothing=smoothing)
