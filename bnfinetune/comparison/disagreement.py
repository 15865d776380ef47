"""Where cells disagree: classes that one has more of, and images that one sees right and another wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import datasets
import numpy as np

from bnfinetune.comparison.result import Compared, Finished
from bnfinetune.diagnose.page import Picture
from bnfinetune.errors import DataError
from bnfinetune.recipe import Recipe
from bnfinetune.training.data.images import open_image
from bnfinetune.training.data.readable import original_row
from bnfinetune.training.data.splits import load_splits
from bnfinetune.training.measuring.outcomes import NO_LABEL

_CLEAR = 0.5
"""Share of the seeds by which two cells must differ on an image for it to be shown."""


class Disputed(NamedTuple):
    """An image of the validation split on which cells disagree.

    Attributes:
        row: Its row in the set as it was opened.
        seed: A seed under which it was held out.
        label: Its class; -1 where it has several.
        right: The share of seeds under which each cell is right, in the order of the cells.
    """

    row: int
    seed: int
    label: int
    right: tuple[float, ...]

    @property
    def spread(self) -> float:
        """How far the cells are apart."""
        return max(self.right) - min(self.right)


def class_shares(cells: Sequence[Compared]) -> dict[str, list[float]]:
    """By class, the share of validation images that each cell has right, over its seeds; empty for several labels.

    Classes on which cells differ most come first.
    """
    names = next(run for cell in cells for run in cell.runs.values()).class_names
    columns = [_by_class(list(cell.runs.values()), len(names)) for cell in cells]
    rows = {name: [column[number] for column in columns] for number, name in enumerate(names)}
    known = {name: row for name, row in rows.items() if not np.isnan(row).any()}
    return dict(sorted(known.items(), key=lambda item: min(item[1]) - max(item[1])))


def _by_class(runs: Sequence[Finished], classes: int) -> list[float]:
    found = [run.outcomes["validation"] for run in runs]
    label, right = (np.concatenate([getattr(each, name) for each in found]) for name in ("label", "right"))
    return [float(right[label == number].mean()) if (label == number).any() else np.nan for number in range(classes)]


def disputed(cells: Sequence[Compared], most: int = 12) -> list[Disputed]:
    """Images that some cell sees right and another wrong under most of the seeds that all cells have in common."""
    seeds = sorted(set.intersection(*(set(cell.runs) for cell in cells)))
    right: dict[int, list[list[float]]] = {}
    known: dict[int, tuple[int, int]] = {}
    for seed in seeds:
        found = [cell.runs[seed].outcomes["validation"] for cell in cells]
        for place, row in enumerate(found[0].row.tolist()):
            right.setdefault(row, []).append([float(each.right[place]) for each in found])
            known.setdefault(row, (seed, int(found[0].label[place])))
    images = [Disputed(row, *known[row], tuple(map(float, np.mean(each, axis=0)))) for row, each in right.items()]
    apart = [image for image in images if image.spread > _CLEAR]
    return sorted(apart, key=lambda image: (-image.spread, image.row))[:most]


def pictures(images: Sequence[Disputed], names: Sequence[str], recipe: Recipe, classes: Sequence[str]) -> list[Picture]:
    """Thumbnails of disputed images, with who is right; empty where the set can no longer be read or is a stream.

    Args:
        images: They.
        names: Of the cells, in order.
        recipe: Of any run: where the images are.
        classes: Names of the classes.
    """
    found: dict[int, Picture] = {}
    try:
        for seed in dict.fromkeys(image.seed for image in images):
            splits = load_splits(recipe.data, seed)
            if isinstance(splits.val, datasets.IterableDataset):
                return []
            places = {original_row(splits.val, place): place for place in range(len(splits.val))}
            for image in (each for each in images if each.seed == seed):
                raw = splits.val[places[image.row]][splits.image_column]
                picture = open_image(raw, f"row {image.row}", recipe.data.max_pixels, levels=splits.levels)
                title = "several labels" if image.label == NO_LABEL else classes[image.label]
                found[image.row] = Picture.of(picture, title, _who(image, names))
    except (DataError, KeyError, OSError):
        return []
    return [found[image.row] for image in images]


def _who(image: Disputed, names: Sequence[str]) -> tuple[str, ...]:
    """Cells by how often they are right, a line each."""
    found: dict[float, list[str]] = {}
    for share, name in sorted(zip(image.right, names, strict=True), key=lambda pair: -pair[0]):
        found.setdefault(share, []).append(name)
    said = {0.0: "wrong", 1.0: "right"}
    return tuple(f"{said.get(share, f'right in {share:.0%}')}: {'; '.join(each)}" for share, each in found.items())
