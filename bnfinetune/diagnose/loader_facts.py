"""How a loader reads its set: in which order, how much of it, and whether it leaves out an uneven rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import DistributedSampler, IterableDataset, SequentialSampler, Subset


def sampler_of(loader: Any) -> Any:
    """What decides the order of the images; None where a loader does not say, or its set streams.

    A `DataLoader` that was given a `batch_sampler`, as Accelerate's wrappers are, holds a `SequentialSampler` beside it
    that nobody asks. Accelerate also puts the batch sampler that it was given into others of its own.
    """
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    *_, innermost = _batch_samplers(loader)
    if innermost is None:
        return getattr(loader, "sampler", None)
    return getattr(innermost, "sampler", None)  # without one it is somebody's own, which may do anything


def _batch_samplers(loader: Any) -> Iterator[Any]:
    """The batch sampler of a loader, and those that it wraps."""
    batches = getattr(loader, "batch_sampler", None)
    yield batches
    while (inner := getattr(batches, "batch_sampler", None)) is not None:
        batches = inner
        yield batches


def reads_in_order(sampler: Any) -> bool:
    """Whether a sampler is known to go through the set as it is stored."""
    return isinstance(sampler, SequentialSampler) or (isinstance(sampler, DistributedSampler) and not sampler.shuffle)


def drops_last(loader: Any) -> bool:
    """Whether a last batch that is not full is left out."""
    *_, innermost = _batch_samplers(loader)
    return bool(getattr(loader if innermost is None else innermost, "drop_last", False))


def images_per_pass(loader: Any) -> int | None:
    """Images that one pass of the loader reads on this process; None where that is not known."""
    if any(getattr(batches, "num_processes", 1) > 1 for batches in _batch_samplers(loader)):
        return None  # Accelerate deals batches out to processes, and fills or leaves out the last ones
    try:
        return len(sampler_of(loader))
    except (AttributeError, TypeError):
        return None


def is_shuffled_subset(dataset: Any) -> bool:
    """Whether a set is a part of another in an order of its own, as `random_split` makes it."""
    if not isinstance(dataset, Subset):
        return False
    indices = list(dataset.indices)
    return indices != sorted(indices)


def labels_of(dataset: Any) -> torch.Tensor | None:
    """Class numbers of a whole set that tells them: torchvision's `targets`, `labels`, or a `TensorDataset`."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(list(dataset.indices), dtype=torch.long)]
    for key in ("targets", "labels"):
        labels = getattr(dataset, key, None)
        if labels is not None and len(labels) == len(dataset):
            with suppress(TypeError, ValueError, RuntimeError):  # names instead of numbers, or no plain list
                return torch.as_tensor(labels).flatten()
    tensors: list[torch.Tensor] = list(getattr(dataset, "tensors", ()))
    whole = len(tensors) > 1 and tensors[-1].ndim == 1 and not tensors[-1].is_floating_point()
    return tensors[-1] if whole else None


def classes_per_batch(labels: torch.Tensor, size: int) -> tuple[float, float]:
    """Mean number of classes in batches in stored order, and in shuffled ones."""
    batches = list(labels.split(size))
    found = sum(len(batch.unique()) for batch in batches) / len(batches)
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    return found, float((1 - (1 - shares) ** min(size, len(labels))).sum())
