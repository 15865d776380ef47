"""Batches of any form, made into what a model takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnfinetune.bn.statistics.padding import real_rows_of
from bnfinetune.errors import StatisticsError

Forward = Callable[[nn.Module, Any], object]

IMAGE_KEYS = ("image", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "target", "y")


class Batch(NamedTuple):
    """A batch and how many samples it holds; None where that cannot be told from its form."""

    data: Any
    rows: int | None


class Feed:
    """Reads batches one by one, without the repeated rows with which distributed loaders even out their ranks.

    Args:
        data: any iterable of batches; nothing is read before the first `next_batch`.
        drop_padding: False hands on every batch as it comes.
    """

    def __init__(self, data: Iterable[Any], *, drop_padding: bool = True) -> None:
        self._data = data
        self._iterator: Iterator[Any] | None = None
        self._real_rows = real_rows_of(data) if drop_padding else None
        self._read = 0

    def next_batch(self) -> Batch | None:
        """The next batch that is not all padding; None at the end of the data."""
        if self._iterator is None:
            self._iterator = iter(self._data)
        for data in self._iterator:
            rows = rows_of(data)
            if rows is None or self._real_rows is None:
                return Batch(data, rows)
            real = self._real_rows(self._read, rows)
            self._read += 1
            if real:
                return Batch(data if real == rows else first_rows(data, real, rows), real)
        return None


def model_input(batch: Any) -> Tensor:
    """The images of a batch: the tensor itself, a tuple's or list's first item, or a dict's images.

    Raises:
        StatisticsError: the batch has another form.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, list | tuple) and batch:
        return model_input(batch[0])
    if isinstance(batch, Mapping):
        for key in IMAGE_KEYS:
            if key in batch:
                return model_input(batch[key])
        found = f"a dict with the keys {', '.join(map(str, batch))}"
    else:
        found = f"a {type(batch).__name__}"
    raise StatisticsError(
        f"cannot find the images in a batch that is {found}; yield a tensor, a tuple with it first, a dict with one of "
        f"{', '.join(IMAGE_KEYS)}, or pass forward=lambda model, batch: ..."
    )


def labels_of(batch: Any) -> Tensor | None:
    """Class labels (N,) that come with a batch, as second item or under a common key; None if there are none."""
    labels = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        labels = batch[1]
    if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point() and len(labels):
        return labels
    return None


def rows_of(batch: Any) -> int | None:
    """How many samples a batch holds; None if it holds no tensor with rows."""
    if _is_sample_list(batch):
        return len(batch)
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if isinstance(batch, list | tuple | Mapping):
        items = batch.values() if isinstance(batch, Mapping) else batch
        return next((rows for item in items if (rows := rows_of(item)) is not None), None)
    return None


def first_rows(batch: Any, keep: int, rows: int) -> Any:
    """A batch of `rows` samples cut to its first `keep`; tensors are views, other items stay as they are."""
    if isinstance(batch, Tensor):
        return batch[:keep] if batch.ndim and len(batch) == rows else batch
    if isinstance(batch, list) and len(batch) == rows and (_is_sample_list(batch) or rows_of(batch) is None):
        return batch[:keep]
    return _map_items(batch, lambda item: first_rows(item, keep, rows))


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return _map_items(batch, lambda item: to_device(item, device))


def _is_sample_list(batch: Any) -> bool:
    """Whether a batch is a list of one dict for each sample, as detectors take them."""
    return isinstance(batch, list) and bool(batch) and all(isinstance(item, Mapping) for item in batch)


def _map_items(batch: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(batch, Mapping):
        return {key: change(item) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(change, batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map(change, batch))
    return batch


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")
