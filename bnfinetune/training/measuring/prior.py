"""`recalibrate.prior=auto`: how far statistics go towards those of the images, by what becomes of the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from bnfinetune.bn.adapt.certainty import InformationGain
from bnfinetune.bn.put_back import kept_buffers
from bnfinetune.bn.statistics.prior_search import choose_prior
from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.diagnose.readout import Readout
from bnfinetune.training.launch import on_main
from bnfinetune.training.measuring.ridge import leave_one_out

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
        found = _of_all_ranks(outputs, model, batches, accelerator)
        return on_main(accelerator, lambda: scores[judge](*found))

    return choose_prior(model, [images for images, _ in batches], score, **selection).report


READ_AT: Final = (0.25, 0.5, 1.0)
"""Weights of the images' own statistics that a readout is made under, beside 0."""


def read_out(model: Any, batches: Sequence[tuple[Tensor, Tensor]], accelerator: Accelerator) -> Readout:
    """Measures what statistics of these images would be worth to a new head; the model is left as it was.

    Args:
        model: The bare network.
        batches: Images (B, C, H, W) and labels (B,) or (B, classes) of this rank.
        accelerator: Its ranks.

    Raises:
        StatisticsError: A pass failed.
    """
    made: list[tuple[Tensor, Tensor]] = []  # right or not, and the squared error, by image

    def score() -> float:
        features, labels = _of_all_ranks(_features, model, batches, accelerator)
        targets = _targets(labels)
        found = leave_one_out(features, targets)
        made.append((_right(found.predictions, labels), (targets - found.predictions).square().sum(1)))
        return -found.error

    put_back = kept_buffers(model)
    try:
        choice = choose_prior(
            model, [images for images, _ in batches], score, shares=READ_AT, every=True, include_frozen=True
        )
    finally:
        put_back()
    by_share = dict(zip(choice.scores, made, strict=True))
    (right, error), (right_before, error_before) = by_share[choice.share], by_share[0.0]
    gain, doubt = _mean_and_doubt(right - right_before)
    less, doubt_of_less = _mean_and_doubt(error_before - error)
    scores = {share: float(each.mean()) for share, (each, _) in by_share.items()}
    sureness = less / doubt_of_less if doubt_of_less else 0.0  # the same network, and no doubt about it
    return Readout(len(right), scores, choice.share, gain, doubt, sureness)


def _mean_and_doubt(apart: Tensor) -> tuple[float, float]:
    """The mean over the images, and its standard error."""
    return float(apart.mean()), float(apart.std() / len(apart) ** 0.5) if len(apart) > 1 else math.inf


def _right(predictions: Tensor, labels: Tensor) -> Tensor:
    """(N,): 1 where the class is right; of several labels, the explained share of each image's part of the variance."""
    if labels.ndim == 1:
        return (predictions.argmax(1) == labels).double()
    centred = (labels.double() - labels.double().mean(0)).square().sum(1)
    return 1 - (labels - predictions).square().sum(1) / centred.mean()


def _of_all_ranks(
    outputs: Callable[[Any, Tensor], Tensor],
    model: Any,
    batches: Sequence[tuple[Tensor, Tensor]],
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """Outputs and labels of the images of all ranks, on the CPU."""
    with torch.no_grad():
        mine = [
            (outputs(model, images.to(accelerator.device)).float().cpu(), labels.cpu()) for images, labels in batches
        ]
    found, labels = map(torch.cat, zip(*gather_object(mine), strict=True))
    return found, labels


def _logits(model: Any, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


def _features(model: Any, images: Tensor) -> Tensor:
    """What reaches the classifier, (B, F)."""
    features: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return features.flatten(1)


def _separation(features: Tensor, labels: Tensor) -> float:
    return -leave_one_out(features, _targets(labels)).error


def _targets(labels: Tensor) -> Tensor:
    return labels if labels.ndim == 2 else F.one_hot(labels)


def _likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean log-likelihood of the labels."""
    loss = F.binary_cross_entropy_with_logits if labels.ndim == 2 else F.cross_entropy
    return -loss(logits, labels.to(logits.dtype) if labels.ndim == 2 else labels).item()
