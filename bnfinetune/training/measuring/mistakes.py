"""The images that a network gets most wrong: often the ones whose label is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from bnfinetune.diagnose.page import Picture
from bnfinetune.training.data.readable import original_row
from bnfinetune.training.data.walking import printable

KEPT = 24
"""Images that are shown."""


class Mistake(NamedTuple):
    """A wrongly classified image.

    Attributes:
        likelihood: probability that the network gives to what is true: to the true class or, of several labels, to the
            one that it gets most wrong being as it is.
        confidence: probability that it gives to `predicted`.
        predicted: the predicted class or, of several labels, the one in question: if among `labels`, it is missed.
        number: the image's place in its split.
        labels: the true classes.
        image: what the network saw, shape (C, H, W), on the CPU.
    """

    likelihood: float
    confidence: float
    predicted: int
    number: int
    labels: tuple[int, ...]
    image: Tensor


class Mistakes:
    """Keeps the images of a split whose labels the network finds least likely, as they are measured.

    Args:
        kept: how many at most.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self.worst: list[Mistake] = []

    @torch.no_grad()
    def add(self, images: Tensor, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Looks at one batch: images (B, C, H, W), logits (B, classes), labels (B,) or (B, classes), indices (B,)."""
        several = labels.ndim == 2
        likelihood, confidence, predicted, wrong = (_judge_labels if several else _judge_class)(logits.float(), labels)
        found = wrong.nonzero().flatten()
        chosen = found[likelihood[found].argsort(stable=True)[: self._kept]]
        true = [tuple(row.nonzero().flatten().tolist()) if several else (int(row),) for row in labels[chosen].cpu()]
        columns = (likelihood, confidence, predicted, indices.to(labels.device))
        rows = zip(*(column[chosen].tolist() for column in columns), true, images[chosen].float().cpu(), strict=True)
        self._keep([*self.worst, *(Mistake(*row) for row in rows)])

    def merge(self) -> None:
        """Gives every rank the worst of all ranks; a collective."""
        self._keep(gather_object(self.worst))

    def _keep(self, found: Sequence[Mistake]) -> None:
        self.worst = sorted(found, key=lambda each: (each.likelihood, each.number))[: self._kept]


Judged = tuple[Tensor, Tensor, Tensor, Tensor]  # likelihood, confidence, predicted class, whether wrong, each (B,)


def _judge_class(logits: Tensor, labels: Tensor) -> Judged:
    shares = logits.softmax(1)
    confidence, predicted = shares.max(1)
    return _at(shares, labels), confidence, predicted, predicted != labels


def _judge_labels(logits: Tensor, labels: Tensor) -> Judged:
    """By the label of each image that is furthest from what the network thinks."""
    shares = logits.sigmoid()
    gap, predicted = (shares - labels).abs().max(1)
    return 1 - gap, _at(shares, predicted), predicted, gap > 0.5


def _at(values: Tensor, classes: Tensor) -> Tensor:
    """Of each row, the value of its class."""
    return values.gather(1, classes[:, None]).squeeze(1)


def pictures(
    worst: Sequence[Mistake], reader: Any, class_names: Sequence[str], data_config: Mapping[str, Any]
) -> tuple[Picture, ...]:
    """Thumbnails of mistakes, with what they are and what they are taken for.

    Args:
        worst: the mistakes.
        reader: the `ImageReader` of their split.
        class_names: names of the classes, in order.
        data_config: timm's preprocessing, whose normalisation is undone.
    """
    return tuple(
        Picture.of(
            _as_seen(each.image, data_config),
            title=", ".join(class_names[label] for label in each.labels) or "no label",
            lines=(
                f"{_fault(each)} {class_names[each.predicted]}, {each.confidence:.0%}",
                image_label(reader, each.number),
            ),
        )
        for each in worst
    )


def told(worst: Sequence[Mistake], reader: Any, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Mistakes in names and numbers: the true `classes`, and the one that is `taken_for` them, or is `missed`."""
    return [
        {"image": image_label(reader, each.number)}
        | {"classes": [class_names[label] for label in each.labels]}
        | {_fault(each).replace(" ", "_"): class_names[each.predicted]}
        | {"likelihood": each.likelihood, "confidence": each.confidence}
        for each in worst
    ]


def _fault(mistake: Mistake) -> str:
    return "missed" if mistake.predicted in mistake.labels else "taken for"


def image_label(reader: Any, index: int) -> str:
    """What tells an image to the owner of the data: its folder and file, or its row."""
    if reader.split is None:
        return f"row {index}"
    raw, row = reader.split[index][reader.image_column], original_row(reader.split, index)
    path = raw.get("path") if raw else None
    return f"row {row}" if path is None else printable("/".join(PurePath(path).parts[-2:]))


def _as_seen(image: Tensor, data_config: Mapping[str, Any]) -> Image.Image:
    """An image as it was before normalisation."""
    mean, std = (torch.tensor(data_config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    if len(pixels) != 3:  # a network of one channel, or of more than a picture has
        pixels = pixels[:1].expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
