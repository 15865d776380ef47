"""Finding unreadable images before training starts, within a bounded amount of work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, Final

import datasets
import numpy as np

from bnfinetune.errors import DataError
from bnfinetune.training.data.images import check_header, open_image, wide_extremes
from bnfinetune.training.data.levels import Levels, levels_of
from bnfinetune.training.data.walking import printable

_SMALL_BYTES: Final = 32 * 2**20  # a split of fewer bytes and images is decoded as a whole, in a few seconds
_SMALL_IMAGES: Final = 10_000
_LEVEL_IMAGES: Final = 1_000  # of a split that are looked at for values of more than 8 bits
_FIRST_OF_STREAM: Final = 64
_HEADERS: Final = 2_000  # images of a larger split whose first bytes are read, evenly spaced


def unreadable_images(split: Any, column: str, where: str, max_pixels: int) -> dict[int, str]:
    """What is wrong with the images of a split, by row: all of a small one, some headers of a large one.

    Args:
        split: A `datasets.Dataset` with undecoded images.
        column: Its column of images.
        where: What a message calls the split.
        max_pixels: Largest width times height.
    """
    small = _is_small(split, column)
    # the smallest decoding of a JPEG still reads all of it
    check = partial(open_image, shortest=1) if small else check_header
    count = len(split) if small else min(len(split), _HEADERS)
    rows = np.linspace(0, len(split) - 1, count).round().astype(np.int64)
    broken = {}
    for row, raw in _raw_images(split, column, rows):
        try:
            check(raw, image_name(raw, row, where), max_pixels)
        except DataError as error:
            broken[row] = str(error)
    return broken


def find_levels(split: Any, column: str) -> Levels:
    """Which values of the 16-bit and float images of a split are black and white; empty where there are none.

    Of a large split, some images are looked at, evenly spaced; of a stream, the first.

    Args:
        split: A `datasets.Dataset` or `IterableDataset` with undecoded images.
        column: Its column of images.
    """
    if isinstance(split, datasets.IterableDataset):
        raws: Any = (row[column] for row in islice(split.select_columns([column]), _FIRST_OF_STREAM))
    else:
        rows = np.unique(np.linspace(0, len(split) - 1, _LEVEL_IMAGES).round().astype(np.int64))
        raws = (raw for _, raw in _raw_images(split, column, rows))
    return levels_of(found for raw in raws if (found := wide_extremes(raw)) is not None)


def image_name(raw: Mapping[str, Any] | None, row: int, where: str) -> str:
    """What a message calls an image: its path, or its row and the name it has inside its file."""
    path = raw.get("path") if raw else None
    if raw and raw.get("bytes") is None and path:
        return printable(path)
    return f"in row {row} of {where}" + (f" ({printable(path)})" if path else "")


def original_row(split: Any, index: int) -> int:
    """The row of the split as it was opened that stands at `index` after rows were chosen from it."""
    chosen = split._indices
    return index if chosen is None else int(chosen.column(0)[index].as_py())


def _raw_images(split: Any, column: str, rows: Any, size: int = 256) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield from zip(batch.tolist(), split[batch][column], strict=True)


def _is_small(split: Any, column: str) -> bool:
    """Whether the encoded images are few and small together; the first that are too many bytes end the count."""
    if len(split) > _SMALL_IMAGES:
        return False
    total = 0
    for _, raw in _raw_images(split, column, np.arange(len(split))):
        if raw is not None:
            total += len(raw["bytes"]) if raw.get("bytes") is not None else _file_size(raw.get("path"))
        if total > _SMALL_BYTES:
            return False
    return True


def _file_size(path: str | None) -> int:
    try:
        return os.path.getsize(path) if path else 0
    except OSError:
        return 0  # the check itself says what is wrong
