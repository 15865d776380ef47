"""Whether a network computes in another format what it computed before: asked on real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from datasets import IterableDataset
from PIL import Image

from bnfinetune.errors import DataError, ExportError
from bnfinetune.inference.predictor import Predictor
from bnfinetune.recipe import Recipe
from bnfinetune.training.data.images import open_image
from bnfinetune.training.data.levels import Levels
from bnfinetune.training.data.splits import Network, load_splits

_BATCH: Final = 32


@dataclass(frozen=True)
class Agreement:
    """How far two networks agree on the same images, each with its own preprocessing.

    Attributes:
        images: How many were compared.
        largest: Largest difference of a score.
        scale: Largest score of the first network, by absolute value.
        equal: Share of images with the same answer: the same likeliest class or, of any number of labels, the same
            labels.
        answer: What is counted as an answer, in words.
    """

    images: int
    largest: float
    scale: float
    equal: float
    answer: str

    @property
    def relative(self) -> float:
        """The largest difference in units of the scale."""
        return self.largest / self.scale if self.scale else self.largest

    def __str__(self) -> str:
        share = f"{self.equal:.1%}" if self.equal in (0.0, 1.0) else f"{self.equal:.3%}"
        return (
            f"{self.images} images compared: largest difference {self.largest:.1e} of scores up to {self.scale:.3g} "
            f"({self.relative:.1e} of them), equal {self.answer} {share}"
        )

    def require(self, tolerance: float) -> None:
        """Raises an `ExportError` if scores differ by more than a share of their scale, or an answer has changed."""
        if not self.relative <= tolerance or self.equal < 1:  # no number is no agreement
            raise ExportError(
                f"the written network computes something else: {self}; allowed: {tolerance:g} and no other answer. "
                "Nothing is kept; on_difference=note keeps it"
            )


def compare(first: Predictor, second: Predictor, images: Sequence[Image.Image]) -> Agreement:
    """Compare two networks on RGB images, in batches of several sizes.

    Raises:
        DataError: There is no image.
    """
    if not images:
        raise DataError("no image can be read to compare the written network on; name others by data.source=")
    one, other = (_scores(network, images) for network in (first, second))
    return Agreement(
        images=len(images),
        largest=float((one - other).abs().max()),
        scale=float(one.abs().max()),
        equal=float((_answers(first, one) == _answers(first, other)).all(dim=1).double().mean()),
        answer="labels" if first.preprocessing.is_multilabel else "top-1",
    )


def real_images(recipe: Recipe, levels: Levels, count: int, *, whole: bool) -> list[Image.Image]:
    """Up to `count` images of what a recipe is evaluated on, evenly spaced; those that cannot be read are left out.

    Args:
        recipe: Names the images.
        levels: Values of 16-bit and float images that become 0 and 255; empty for those of the set.
        count: How many; of a stream the first.
        whole: Take all of a set that has no split of its own for evaluation.

    Raises:
        DataError: The set cannot be used.
    """
    splits = load_splits(recipe.data, recipe.run.seed, network=Network((), levels), whole=whole)
    found = []
    for raw in _raw(splits.val, splits.image_column, count):
        try:
            found.append(open_image(raw, "", recipe.data.max_pixels, levels=splits.levels))
        except DataError:
            continue
    return found


def _raw(split: Any, column: str, count: int) -> list[Any]:
    if isinstance(split, IterableDataset):
        return [row[column] for row in islice(split, count)]
    places = np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)
    return [split[int(place)][column] for place in places]


def _scores(network: Predictor, images: Sequence[Image.Image]) -> torch.Tensor:
    """Scores (images, classes) in float64; the first image goes alone, so that a fixed batch size would be seen."""
    sizes = [images[:1], *(images[start : start + _BATCH] for start in range(1, len(images), _BATCH))]
    return torch.cat([network.scores(batch) for batch in sizes]).double()


def _answers(network: Predictor, scores: torch.Tensor) -> torch.Tensor:
    """What is answered for each image: (images, 1) class numbers, or (images, classes) of which labels are given."""
    if network.preprocessing.is_multilabel:
        return scores.sigmoid() >= torch.tensor(network.preprocessing.thresholds)
    return scores.argmax(dim=1, keepdim=True)
