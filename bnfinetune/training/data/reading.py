"""From picks to a batch of pixels: read, decode, augment. This is what runs in loader processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from datasets import IterableDataset
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bnfinetune.errors import DataError
from bnfinetune.training.data.decoded import Shelf
from bnfinetune.training.data.images import open_image
from bnfinetune.training.data.labels import column_numbers, is_list
from bnfinetune.training.data.levels import Levels
from bnfinetune.training.data.readable import image_name, original_row
from bnfinetune.training.data.sampling import Pick
from bnfinetune.training.data.seeding import derive_seed, preserved_draws, seed_draws
from bnfinetune.training.data.transforms import Transform

_STAND_INS: Final = 16  # neighbours that are tried in place of an unreadable training image
_ERASING = 6  # stream of random draws


class Batch(NamedTuple):
    """What a loader process sends: images, labels, their indices, and the unreadable images it met.

    Labels are class numbers (B,), or of 0 and 1 (B, classes) where an image may have any number of them.
    Images are bytes that the transform's `finish` makes floats of on the device; floats where parts of them are erased.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    skipped: list[str]
    domains: Tensor | None = None


@dataclass(frozen=True)
class Failure:
    """An error on its way from a loader process; torch would wrap an exception in its traceback."""

    message: str


class ImageReader(Dataset[Any]):
    """Reads, decodes and transforms the images that a sampler picks.

    Args:
        split: A `datasets.Dataset` with undecoded images, or an `IterableDataset`, whose rows come with the picks.
        columns: Names of the image and the label column.
        transform: What makes a tensor of an RGB image.
        where: What a message calls the split.
        max_pixels: Largest width times height of an image.
        seed: Seed of the augmentation, which is then a function of (seed, epoch, index) alone; None if `transform` is
            deterministic.
        skip: Leave unreadable images out instead of failing. In training, a neighbour stands in for each, so that
            batches keep their size; elsewhere the batch is smaller.
        decoded: Where images are kept once they are decoded or, if `transform` is deterministic, drawn.
        domains: Domain number of each image, of shape `(rows,)`, or None.
        levels: Values of 16-bit and float images that become 0 and 255.
    """

    def __init__(
        self,
        split: Any,
        columns: tuple[str, str],
        *,
        transform: Transform,
        where: str,
        max_pixels: int,
        seed: int | None = None,
        skip: bool = False,
        decoded: Shelf | None = None,
        domains: NDArray[np.int64] | None = None,
        levels: Levels | None = None,
    ) -> None:
        self.image_column, self.label_column = columns
        self.split = None if isinstance(split, IterableDataset) else split
        self.labels = None if self.split is None else column_numbers(split, self.label_column)
        feature = split.features[self.label_column]
        self.classes = len(feature.feature.names) if is_list(feature) else None  # of an image of any number of them
        self.transform, self.where, self.max_pixels, self.seed, self.skip = transform, where, max_pixels, seed, skip
        self.domains, self.levels = domains, levels
        self.decoded = None if self.split is None else decoded

    def __getitems__(self, picks: list[Pick]) -> Batch | Failure:
        """The batch that a sampler picked; torch's loader calls this once per batch."""
        try:
            with nullcontext() if self.seed is None else preserved_draws():
                return self._batch(picks)
        except DataError as error:
            return Failure(str(error))

    def __getitem__(self, pick: Pick) -> Batch | Failure:
        """A batch of one."""
        return self.__getitems__([pick])

    def _batch(self, picks: list[Pick]) -> Batch:
        skipped: list[str] = []
        drawn = [each for pick in picks if (each := self._draw_or_skip(pick, picks, skipped)) is not None]
        used, pixels = [pick for pick, _ in drawn], [each for _, each in drawn]
        images = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0)
        if self.seed is not None and self.transform.erase is not None and pixels:
            images = self.transform.finish(images)
            for image, pick in zip(images, used, strict=True):
                seed_draws(derive_seed(self.seed, _ERASING, pick.epoch, pick.number))
                self.transform.erase(image)
        labels = torch.from_numpy(np.array([self._label(pick) for pick in used]))
        numbers = [pick.number for pick in used]
        domains = None if self.domains is None else torch.from_numpy(self.domains[numbers])
        return Batch(images, labels, torch.tensor(numbers, dtype=torch.int64), skipped, domains)

    def _draw_or_skip(
        self, pick: Pick, picks: Sequence[Pick], skipped: list[str]
    ) -> tuple[Pick, NDArray[np.uint8]] | None:
        """The pixels of a pick, or of what stands in for it, or None if it is left out."""
        try:
            return pick, self._draw(pick)
        except DataError as error:
            if not self.skip:
                raise
            skipped.append(str(error))
        if self.seed is None:
            return None
        for stand_in in self._stand_ins(pick, picks):
            try:
                return stand_in, self._draw(stand_in)
            except DataError as error:
                skipped.append(str(error))
        raise DataError(f"no readable image near the unreadable ones: {skipped[-1]}")

    def _stand_ins(self, pick: Pick, picks: Sequence[Pick]) -> Iterator[Pick]:
        """Neighbours in the split or, of a stream, in the batch."""
        if self.split is None:
            yield from (each for each in picks if each is not pick)
            return
        for step in range(1, min(_STAND_INS, len(self.split) - 1) + 1):
            yield Pick(pick.epoch, (pick.number + step) % len(self.split))

    def _draw(self, pick: Pick) -> NDArray[np.uint8]:
        if self.seed is None:
            return self._kept(pick, lambda: self.transform.draw(self._open(pick)))
        image = self._kept(pick, lambda: np.asarray(self._open(pick)))
        seed_draws(derive_seed(self.seed, pick.epoch, pick.number))
        return self.transform.draw(Image.fromarray(image))

    def _kept(self, pick: Pick, make: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        return make() if self.decoded is None else self.decoded.get(pick.number, make)

    def _open(self, pick: Pick) -> Image.Image:
        if self.split is None:
            raw, row = (pick.row or {}).get(self.image_column), pick.number
        else:
            raw, row = self.split[pick.number][self.image_column], original_row(self.split, pick.number)
        where = image_name(raw, row, self.where)
        return open_image(raw, where, self.max_pixels, self.transform.shortest, self.levels)

    def _label(self, pick: Pick) -> Any:
        """The class number of an image, or its labels as 0 and 1, of shape `(classes,)`."""
        if self.labels is not None:
            return self.labels[pick.number]
        label = (pick.row or {}).get(self.label_column)
        numbers = (label or []) if self.classes else [-1 if label is None else label]
        if min(numbers, default=0) < 0:
            raise DataError(f"the image in row {pick.number} of {self.where} has no label")
        return numbers[0] if self.classes is None else np.isin(np.arange(self.classes), numbers).astype(np.uint8)
