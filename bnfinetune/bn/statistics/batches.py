"""Batches of any form: where their images are, how many samples they hold, and their first few samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bnfinetune.bn.statistics.padding import real_rows_of
from bnfinetune.errors import StatisticsError

Forward = Callable[[nn.Module, Any], object]

IMAGE_KEYS = ("image", "images", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "target", "y")
ONLY_FIRST_VIEW = (
    "batches hold {views} tensors of images, such as several crops, of which only the first was read; pass "
    "forward=lambda model, batch: ... if the model takes them all"
)

_COLOURS = (1, 3, 4)


class Images(NamedTuple):
    """The part of a batch that holds its images, and what its first dimension counts.

    Attributes:
        part: the tensor, list or tuple itself.
        form: `tensor` (N, ...); `samples`, a list of one item for each sample, as detectors take them; or `views`, a
            list of tensors (N, ...) that show the same samples.
        samples: N.
    """

    part: Any
    form: Literal["tensor", "samples", "views"]
    samples: int


class Batch(NamedTuple):
    """A batch and how many samples it holds; None where that cannot be told from its form."""

    data: Any
    samples: int | None


class BatchReader:
    """Reads batches one by one, without the repeated rows with which distributed loaders even out their ranks.

    Args:
        data: any iterable of batches; nothing is read before the first `next_batch`.
        drop_padding: False hands on every batch as it comes.

    Attributes:
        views: views of each sample in the batches so far, at most.
    """

    def __init__(self, data: Iterable[Any], *, drop_padding: bool = True) -> None:
        self._data = data
        self._iterator: Iterator[Any] | None = None
        self._real_rows = real_rows_of(data) if drop_padding else None
        self._read = 0
        self.views = 1

    def next_batch(self) -> Batch | None:
        """The next batch that is not all padding; None at the end of the data."""
        if self._iterator is None:
            self._iterator = iter(self._data)
        for data in self._iterator:
            images = find_images(data)
            self.views = max(self.views, _views_in(data, images))
            if images is None or self._real_rows is None:
                return Batch(data, None if images is None else images.samples)
            real = self._real_rows(self._read, images.samples)
            self._read += 1
            if real:
                return Batch(first_samples(data, real), real)
        return None


def find_images(batch: Any) -> Images | None:
    """Finds the images of a batch: by a dict's key, or else what comes first; None where nothing counts samples.

    A list counts samples if each item is one: dicts, images (C, H, W), or anything that is no tensor. Several tensors
    (N, C, H, W) in the place of one are views. Where shapes fit both, the number of labels decides.
    """
    if isinstance(batch, Tensor):
        return Images(batch, "tensor", len(batch)) if batch.ndim else None
    if isinstance(batch, Mapping):
        items = [batch[key] for key in IMAGE_KEYS if key in batch] or list(batch.values())
    elif _is_list(batch):
        if _holds_samples(batch):
            return Images(batch, "samples", len(batch))
        items = list(batch)
    else:
        return None
    labels = _label_count(batch)
    found = (_images_in(item, labels) for item in items)
    return next((images for images in found if images is not None), None)


def model_input(batch: Any) -> Any:
    """What a model takes of a batch: a tensor (N, ...), of several views the first, or a list with one item per sample.

    Raises:
        StatisticsError: the batch has another form.
    """
    images = find_images(batch)
    if images is not None and _is_expected(batch, images.part):
        if images.form == "views":
            return images.part[0]
        if images.form == "tensor" or not any(map(_is_list, images.part)):
            return images.part
    kind = f"a dict with the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else _described(batch)
    raise StatisticsError(
        f"cannot find the images in a batch that is {kind}; yield a tensor, a tuple with it first, a dict with one of "
        f"{', '.join(IMAGE_KEYS)}, or pass forward=lambda model, batch: ..."
    )


def images_tensor(batch: Any, caller: str) -> Tensor:
    """The images of a batch as one tensor (N, ...), of several views the first.

    Raises:
        StatisticsError: the batch has another form.
    """
    images = model_input(batch)
    if isinstance(images, Tensor):
        return images
    raise StatisticsError(
        f"{caller} needs batches with one tensor of images (N, ...), and got a list of {len(images)} samples; "
        "collate images of one size"
    )


def listed_images(batch: Any) -> list[Tensor] | None:
    """The images (C, H, W) of a batch that lists one for each sample, as detectors take them; None of another form."""
    images = find_images(batch)
    if images is None or images.form != "samples":
        return None
    listed = [image for image in images.part if isinstance(image, Tensor) and image.is_floating_point()]
    are_images = len(listed) == images.samples and all(t.ndim == 3 and len(t) in _COLOURS for t in listed)
    alike = len({(len(image), image.device) for image in listed}) == 1
    return listed if are_images and alike else None


def labels_of(batch: Any) -> Tensor | None:
    """Class labels (N,) that come with a batch, as second item or under a common key; None if there are none."""
    labels = _labels(batch)
    if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point() and len(labels):
        return labels
    return None


def first_samples(batch: Any, keep: int) -> Any:
    """A batch cut to its first samples, whatever comes with the images included; tensors are views."""
    images = find_images(batch)
    if images is None or keep == images.samples:
        return batch
    return _cut(batch, keep, images)


def first_batches(data: Iterable[Any], samples: int) -> Iterator[Any]:
    """Batches until there are so many samples; the last is cut. One whose samples cannot be told is the last."""
    for batch in data:
        found = find_images(batch)
        count = samples if found is None else found.samples
        yield first_samples(batch, min(count, samples))
        samples -= count
        if samples <= 0:
            return


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return _map_items(batch, lambda item: to_device(item, device))


def device_of(model: nn.Module) -> torch.device:
    """The device that a model computes on: of its first parameter or buffer that holds values.

    Accelerate's offloading leaves parameters without values; then its hooks tell the device.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        if tensor.device.type != "meta":
            return tensor.device
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return tensors[0].device if tensors else torch.device("cpu")


def _images_in(item: Any, labels: int | None) -> Images | None:
    """`find_images` where something else than images may come beside them, such as so many labels."""
    if not _is_list(item):
        return find_images(item)
    if not item or not all(isinstance(each, Tensor) for each in item):
        scalars = item and all(isinstance(each, str | bytes | int | float) for each in item)
        return None if scalars else Images(item, "samples", len(item))
    sizes = {len(tensor) for tensor in item if tensor.ndim}
    are_views = len(sizes) == 1 and item[0].ndim not in (0, 1, 3)
    if labels is not None and len(sizes) == 1 and (labels in sizes) != (labels == len(item)):
        are_views = labels in sizes
    return Images(item, "views", sizes.pop()) if are_views else Images(item, "samples", len(item))


def _holds_samples(items: Any) -> bool:
    """Whether a list has one item for each sample: dicts, images (C, H, W), or images each with what belongs to it."""
    if not items:
        return False
    if all(isinstance(item, Mapping) for item in items):
        return True
    if all(_is_list(item) and len(item) > 1 for item in items):
        return all(isinstance(a, Tensor) and not (isinstance(b, Tensor) and a.ndim == b.ndim) for a, b, *_ in items)
    if not isinstance(items, list) or len(items) < 2 or not all(isinstance(item, Tensor) for item in items):
        return False
    return all(t.ndim == 3 and t.shape[0] == items[0].shape[0] and t.shape[0] in _COLOURS for t in items)


def _views_in(batch: Any, images: Images | None) -> int:
    """How many tensors of a batch look like its images: several crops, in a list of their own or side by side."""
    if images is None or images.form == "samples":
        return 1
    if images.form == "views":
        return len(images.part)
    beside = [item for item in batch if isinstance(item, Tensor)] if _is_list(batch) else []
    alike = [t for t in beside if t.ndim >= 4 and t.is_floating_point() and t.shape[:2] == images.part.shape[:2]]
    return max(len(alike), 1)


def _labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    return batch[1] if _is_list(batch) and len(batch) > 1 else None


def _label_count(batch: Any) -> int | None:
    labels = _labels(batch)
    if isinstance(labels, Tensor):
        return len(labels) if labels.ndim else None
    return len(labels) if _is_list(labels) else None


def _is_expected(batch: Any, part: Any) -> bool:
    """Whether the images are where a model's input is looked for: at the front, or under a known key."""
    if batch is part:
        return True
    if isinstance(batch, Mapping):
        return any(_is_expected(batch[key], part) for key in IMAGE_KEYS if key in batch)
    return _is_list(batch) and len(batch) > 0 and _is_expected(batch[0], part)


def _described(batch: Any) -> str:
    return (
        f"a {type(batch).__name__} of {type(batch[0]).__name__}s"
        if _is_list(batch) and batch
        else (f"a {type(batch).__name__}")
    )


def _cut(item: Any, keep: int, images: Images) -> Any:
    if item is images.part and images.form != "views":
        return item[:keep]
    if isinstance(item, Tensor):
        return item[:keep] if item.ndim and len(item) == images.samples else item
    if _is_list(item) and item is not images.part and len(item) == images.samples and not _holds(item, images.part):
        # one item for each sample, unless these are tensors that each hold all samples
        whole = all(isinstance(each, Tensor) and each.ndim and len(each) == len(item) for each in item)
        if images.form == "samples" or not whole:
            return item[:keep]
    return _map_items(item, lambda each: _cut(each, keep, images))


def _holds(item: Any, part: Any) -> bool:
    items = item.values() if isinstance(item, Mapping) else item if _is_list(item) else ()
    return item is part or any(_holds(each, part) for each in items)


def _is_list(item: Any) -> bool:
    return isinstance(item, list | tuple)


def _map_items(batch: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(batch, Mapping):
        return {key: change(item) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(change, batch))
    if _is_list(batch):
        return type(batch)(map(change, batch))
    return batch
