"""What a network makes of every image of a split: what comparisons of networks, image by image, go by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from bnfinetune.errors import CheckpointError
from bnfinetune.training.data.readable import original_row
from bnfinetune.training.saving.atomic import in_words

OUTCOMES = "outcomes.npz"
NO_LABEL = -1
"""The class of an image that has several."""


class Outcomes:
    """Collects the outcome of every image as a split is measured."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, images: Tensor, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Looks at one batch: images (B, C, H, W), logits (B, classes), labels (B,) or (B, classes), indices (B,)."""
        predicted = logits.argmax(1)
        if labels.ndim == 2:
            right, label = ((logits > 0) == (labels > 0.5)).double().mean(1), torch.full_like(predicted, NO_LABEL)
        else:
            right, label = (predicted == labels).double(), labels
        self._parts.append((indices.cpu(), right.cpu(), predicted.cpu(), label.cpu()))

    def merge(self) -> None:
        """Gives every rank the outcomes of all ranks; a collective."""
        self._parts = gather_object(self._parts)

    def columns(self, reader: Any) -> dict[str, NDArray[Any]]:
        """Arrays of one value per image, in the order of the split: those of `SplitOutcomes`.

        Args:
            reader: The `ImageReader` of the split; of a stream, whose images have no row, the place counts.
        """
        split = reader.split
        numbers, right, predicted, label = (torch.cat(parts).numpy() for parts in zip(*self._parts, strict=True))
        order = np.argsort(numbers, kind="stable")
        places = numbers[order]
        rows = places if split is None else np.array([original_row(split, int(number)) for number in places])
        return {"row": rows, "right": right[order], "predicted": predicted[order], "label": label[order]}


class SplitOutcomes(NamedTuple):
    """The outcomes of one split; each array has one value per image, in the order of the split.

    Attributes:
        row: the image's row in the set as it was opened.
        right: 1 where the class is right, else 0; of several labels, the share of them that is.
        predicted: the likeliest class.
        label: the true class; -1 where an image has several labels.
    """

    row: NDArray[np.int64]
    right: NDArray[np.float64]
    predicted: NDArray[np.int64]
    label: NDArray[np.int64]


def write_outcomes(folder: Path, splits: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
    """Write the outcomes of a run's best network, by split, into its folder."""
    target = folder / OUTCOMES
    with in_words(str(target)):
        temporary = target.with_name(f".{target.stem}.tmp.npz")
        arrays: dict[str, Any] = {
            f"{split}.{name}": values for split, columns in splits.items() for name, values in columns.items()
        }
        np.savez_compressed(temporary, **arrays)
        temporary.replace(target)


def read_outcomes(folder: Path) -> dict[str, SplitOutcomes]:
    """What `write_outcomes` wrote, by split.

    Raises:
        CheckpointError: The folder is not that of a finished run.
    """
    try:
        with np.load(folder / OUTCOMES, allow_pickle=False) as file:
            names = dict.fromkeys(key.rpartition(".")[0] for key in file.files)
            return {name: SplitOutcomes(*(file[f"{name}.{key}"] for key in SplitOutcomes._fields)) for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is not the folder of a finished run: {OUTCOMES} cannot be read") from error
