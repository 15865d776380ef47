"""A classifier fitted to features before anything is trained: logistic regression, its strength by cross-validation.

Fine-tuning from a head of zeros, or a drawn one, first moves the features towards whatever suits that head; from a head
that is fitted already they move little, and keep more of what they know of other data (Kumar et al. 2022, "Fine-Tuning
can Distort Pretrained Features and Underperform Out-of-Distribution": LP-FT).

The features x of all images are centred and brought to a mean squared norm of 1. Then W and b minimise

    C sum_i loss(W x_i + b, y_i) + |W|^2 / 2

where the loss is cross entropy, or the sum of binary ones where an image has any number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, Final, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bnfinetune.errors import BackboneError, DataError
from bnfinetune.training.data.loaders import EvalLoader
from bnfinetune.training.data.sampling import Pick
from bnfinetune.training.data.stratify import hold_out, subset
from bnfinetune.training.launch import on_main
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.probe.cache import ArrayCache
from bnfinetune.training.probe.features import Extractor, one_image

STRENGTHS: Final = tuple(float(strength) for strength in np.logspace(-1, 5, 13))
"""Values of C that are tried, from strong to weak regularisation."""

_MOST: Final = 10_000  # images that a head is fitted to: more take long, and fine-tuning sees them all
_FEW: Final = 2_000  # images up to which one division into fitted and held-out ones is too uncertain
_DIVISIONS, _HELD_OUT = 5, 0.2


class FittedHead(NamedTuple):
    """A linear classifier.

    Attributes:
        weight: (classes, F), for features as they are.
        bias: (classes,).
        strength: C of the objective.
        held_out_loss: Mean loss of held-out images under this C.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    held_out_loss: float


def fit_trainer_head(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Fit the classifier of a run's networks to the training images, prepared as for evaluation.

    Every rank computes its share of the features; rank 0 fits, and hands over to the others.

    Raises:
        BackboneError: The network's scores are not those of one linear layer.
        DataError: An image is unreadable.
    """
    accelerator, loaders, recipe = trainer.accelerator, trainer.loaders, trainer.recipe
    classifier: Any = cast(Any, trainer.model).get_classifier()
    extractor = Extractor(trainer.model, accelerator) if isinstance(classifier, torch.nn.Linear) else None
    if extractor is None or classifier.bias is None or not extractor.is_exact(one_image(loaders.train)):
        raise BackboneError(
            f"model.head=fitted: the scores of {recipe.model.name} are not those of one linear layer with a bias "
            "behind its features; set model.head=new"
        )
    with closing(ArrayCache(recipe.train.model_copy(update={"cache_dir": None}), accelerator)) as arrays:
        features, labels = _training_features(trainer, extractor, arrays)
        fitted = on_main(accelerator, lambda: fit(features, labels, trainer.num_classes, recipe.run.seed))
    with torch.no_grad():
        for network in trainer.networks().values():
            layer = cast(Any, network).get_classifier()
            layer.weight.copy_(fitted.weight)
            layer.bias.copy_(fitted.bias)
    say(
        f"head   fitted to {len(labels)} training images with C={fitted.strength:.3g}, "
        f"loss {fitted.held_out_loss:.3f} on those held out"
    )


def fit(features: NDArray[Any], labels: NDArray[Any], num_classes: int, seed: int = 0) -> FittedHead:
    """Logistic regression with the C of `STRENGTHS` under which images that are held out have the smallest loss.

    Args:
        features: (N, F).
        labels: (N,), or (N, classes) of 0 and 1.
        num_classes: Some of which may have no image.
        seed: Of the stratified divisions into images that are fitted and held out.

    Raises:
        DataError: There are too few images to hold any out.
    """
    exact = torch.from_numpy(np.asarray(features, dtype=np.float64))
    targets = torch.from_numpy(np.asarray(labels))
    center = exact.mean(0)
    scale = (exact - center).square().sum(1).mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (exact - center) / scale
    # W lies in the span of the features, and |W| is the same in its coordinates, of which N are enough
    basis = torch.linalg.qr(scaled.T)[0] if len(exact) < len(center) else torch.eye(len(center), dtype=exact.dtype)
    points = scaled @ basis
    losses = _held_out_losses(points, targets, num_classes, seed)
    best = int(np.argmin(losses))
    weight, bias = list(islice(_path(points, targets, num_classes), best + 1))[-1]
    weight = weight @ basis.T / scale
    return FittedHead(weight, bias - weight @ center, STRENGTHS[best], losses[best])


def _held_out_losses(features: Tensor, targets: Tensor, num_classes: int, seed: int) -> list[float]:
    """The mean loss of held-out rows by strength, up to where it has become larger twice."""
    count = _DIVISIONS if len(targets) <= _FEW else 1
    divisions = [hold_out(targets.numpy(), _HELD_OUT, seed + number) for number in range(count)]
    if not len(divisions[0][1]):
        raise DataError("model.head=fitted: no class has a second image to hold out; set model.head=new")
    paths = [_path(features[fitted], targets[fitted], num_classes) for fitted, _ in divisions]
    losses: list[float] = []
    for heads in zip(*paths, strict=True):
        each = [
            _total_loss(features[held] @ weight.T + bias, targets[held]).item() / len(held)
            for (weight, bias), (_, held) in zip(heads, divisions, strict=True)
        ]
        losses.append(sum(each) / count)
        if len(losses) > np.argmin(losses) + 2:
            break
    return losses


def _path(features: Tensor, targets: Tensor, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weight (classes, F) and bias (classes,) by strength; each fit starts from the one before it."""
    from scipy.optimize import minimize  # takes half a second, of which most runs have no use

    count, width = features.shape

    def objective(flat: NDArray[np.float64], strength: float) -> tuple[float, NDArray[np.float64]]:
        point = torch.from_numpy(flat).view(num_classes, width + 1).requires_grad_()
        loss = _total_loss(features @ point[:, :-1].T + point[:, -1], targets) / count
        value = loss + point[:, :-1].square().sum() / (2 * strength * count)
        return value.item(), torch.autograd.grad(value, point)[0].flatten().numpy()

    flat = np.zeros(num_classes * (width + 1))
    for strength in STRENGTHS:
        options = {"maxiter": 1000, "ftol": 1e-10, "gtol": 1e-6}
        flat = minimize(objective, flat, (strength,), "L-BFGS-B", jac=True, options=options).x
        point = torch.from_numpy(flat).view(num_classes, width + 1)
        yield point[:, :-1], point[:, -1]


def _total_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """The sum over rows, and over classes where a row has any number of them."""
    if targets.ndim == 2:
        return F.binary_cross_entropy_with_logits(scores, targets.to(scores.dtype), reduction="sum")
    return F.cross_entropy(scores, targets.long(), reduction="sum")


def _training_features(
    trainer: Trainer, extractor: Extractor, arrays: ArrayCache
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Features and labels of training images, on all ranks; of a large set a stratified part; none unreadable."""
    accelerator, stats = trainer.accelerator, trainer.loaders.stats
    reader: Any = stats.dataset
    rows = np.arange(len(reader.labels))
    if len(rows) > _MOST:
        rows = subset(reader.labels, max(_MOST, trainer.num_classes), trainer.recipe.run.seed)
    mine, size = rows[accelerator.process_index :: accelerator.num_processes], trainer.recipe.evaluate.batch_size
    picks = [[Pick(0, int(row)) for row in mine[i : i + size]] for i in range(0, len(mine), size)]
    images = EvalLoader(reader, picks, workers=stats.num_workers, device=stats.device, persistent=False)

    def fill(features: NDArray[Any], labels: NDArray[Any], seen: NDArray[Any]) -> None:
        with closing(images):
            for batch, found, numbers in images:
                places = np.searchsorted(rows, numbers.numpy())
                features[0, places], labels[0, places], seen[0, places] = extractor(batch), found.numpy(), 1
        stats.skipped.update(images.skipped)

    shapes = {
        "features": ((1, len(rows), extractor.width), np.float32),
        "labels": ((1, len(rows), *reader.labels.shape[1:]), reader.labels.dtype),
        "seen": ((1, len(rows)), np.uint8),
    }
    features, labels, seen = arrays.shared("head", shapes, fill)
    kept = np.asarray(seen[0], dtype=bool)
    return np.asarray(features[0])[kept], np.asarray(labels[0])[kept]
