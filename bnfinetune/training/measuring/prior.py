"""`recalibrate.prior=auto`: how far statistics go towards those of the images, by what becomes of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from bnfinetune.bn.adapt.certainty import InformationGain
from bnfinetune.bn.statistics.prior_search import choose_prior
from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.training.launch import on_main
from bnfinetune.training.measuring.ridge import leave_one_out_error

Judge = Literal["features", "labels", "certainty"]
"""By what a network is judged: how well its features tell the classes apart, for heads that have learned nothing yet;
the loss of its own head; or, without labels, what its predictions tell of the images (`InformationGain`)."""


def recalibrate_by_choice(
    model: Any,
    batches: Sequence[tuple[Tensor, Tensor]],
    judge: Judge,
    accelerator: Accelerator,
    **selection: Any,
) -> PreciseBNReport:
    """Recompute running statistics from these images, held back by the stored ones as far as that is better.

    Args:
        model: The bare network.
        batches: Images (B, C, H, W) and labels (B,) or (B, classes) of this rank.
        judge: By what it is judged.
        accelerator: Its ranks.
        **selection: Options of `precise_bn`.

    Raises:
        StatisticsError: A pass failed; the network is as it was.
    """
    outputs = _features if judge == "features" else _logits
    gain = InformationGain(several=any(labels.ndim == 2 for _, labels in batches))
    scores: dict[Judge, Callable[[Tensor, Tensor], float]] = {
        "features": _separation,
        "labels": _likelihood,
        "certainty": lambda logits, _: gain(logits),
    }

    def score() -> float:
        with torch.no_grad():
            mine = [(outputs(model, images).float().cpu(), labels.cpu()) for images, labels in batches]
        every = gather_object(mine)
        return on_main(accelerator, lambda: scores[judge](*map(torch.cat, zip(*every, strict=True))))

    return choose_prior(model, [images for images, _ in batches], score, **selection).report


def _logits(model: Any, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


def _features(model: Any, images: Tensor) -> Tensor:
    """What reaches the classifier, (B, F)."""
    features: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return features.flatten(1)


def _separation(features: Tensor, labels: Tensor) -> float:
    targets = labels if labels.ndim == 2 else F.one_hot(labels)
    return -leave_one_out_error(features, targets)


def _likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean log-likelihood of the labels."""
    loss = F.binary_cross_entropy_with_logits if labels.ndim == 2 else F.cross_entropy
    return -loss(logits, labels.to(logits.dtype) if labels.ndim == 2 else labels).item()
