"""Population statistics computed between two steps of somebody's training, which goes on as if nothing was read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from bnfinetune.bn.layers import select_layers
from bnfinetune.bn.statistics.batches import Forward, device_of
from bnfinetune.bn.statistics.precise import is_frozen, precise_bn
from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.diagnose.loader_facts import sampler_of
from bnfinetune.errors import DataError, PolicyError

MOMENTS = ("eval", "end")
_WHOLE = (RandomSampler, SequentialSampler, DistributedSampler)
_SEED = 0


class PrecisePass:
    """When a trainer's callback runs `precise_bn`, on which images, and how.

    Args:
        at: `eval`, before each evaluation; `end`, after training; None for never.
        data: batches to read; None for the training images, in an order of the pass's own.
        num_samples: images to read of the training set, over all ranks, at most; all of `data` is read.
        batch_size: of the training images, per rank; None for the loader's.
        forward: called as `forward(model, batch)`.
        options: of `precise_bn`, such as `prior` or `layers`.

    Raises:
        PolicyError: `at` is no such moment.
    """

    def __init__(
        self,
        at: str | None,
        data: Iterable[Any] | None,
        num_samples: int,
        batch_size: int | None,
        forward: Forward | None,
        options: dict[str, Any],
    ) -> None:
        if at is not None and at not in MOMENTS:
            raise PolicyError(f"precise_at={at!r}; choose {' or '.join(map(repr, MOMENTS))}, or None")
        if at is None and (data is not None or options):
            given = "data" if data is not None else next(iter(options))
            raise PolicyError(f"{given} has no meaning without precise_at; give precise_at='eval' or 'end'")
        self.at = at
        self.data = data
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.forward = forward
        self.options = options

    def check(self, model: nn.Module, loader: Any) -> None:
        """Refuses, before training, what would only fail at the first pass.

        Raises:
            PolicyError: every selected layer has frozen statistics.
            DataError: the training images cannot be read a second time.
            SelectionError: a selector matches no BN layer.
        """
        if self.at is None:
            return
        chosen = select_layers(model, self.options.get("layers", "*"), self.options.get("exclude", ()))
        if all(map(is_frozen, chosen.values())) and not self.options.get("include_frozen"):
            raise PolicyError(
                f"precise_at={self.at!r} has nothing to do, as the policy freezes the statistics of all "
                f"{len(chosen)} selected BN layers; leave it out, or give include_frozen=True"
            )
        if self.data is None:
            training_images(loader, self.batch_size or 1)

    def run(self, model: nn.Module, loader: Any, batch_size: int, forward: Forward | None) -> PreciseBNReport:
        """Computes the statistics; a collective in a process group.

        Args:
            model: the network, whose running statistics become those of the images.
            loader: the training loader, of which nothing is read but where its images are.
            batch_size: of the loader, per rank.
            forward: how the trainer calls the network; the user's own goes before it.
        """
        images, options = self.data, dict(self.options)
        if images is None:
            images = training_images(loader, self.batch_size or batch_size)
            options["num_samples"] = min(self.num_samples, len(images.dataset))  # type: ignore[arg-type]
        with same_randomness(device_of(model)):
            return precise_bn(model, images, forward=self.forward or forward, **options)


def training_images(loader: Any, batch_size: int) -> DataLoader[Any]:
    """A second loader over the images of a training loader, shuffled by a seed of its own and dealt to the ranks.

    The training loader itself is not iterated: that would draw from its generators and, behind Accelerate, end the
    epoch for its optimizer.

    Raises:
        DataError: the loader streams, or draws its images by a rule that would not be kept.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        kind = type(loader if dataset is None else dataset).__name__
        raise DataError(f"the training images come from a {kind}, which cannot be read twice; give data=LOADER")
    images = _drawn(dataset, sampler_of(loader))
    ranks, rank = _ranks()
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=DistributedSampler(images, ranks, rank, shuffle=True, seed=_SEED),
        num_workers=getattr(loader, "num_workers", 0),
        collate_fn=getattr(loader, "collate_fn", None),
        worker_init_fn=getattr(loader, "worker_init_fn", None),
        multiprocessing_context=getattr(loader, "multiprocessing_context", None),
        generator=torch.Generator().manual_seed(_SEED),
    )


def _drawn(dataset: Dataset[Any], sampler: Any) -> Dataset[Any]:
    """The images that a sampler draws from a set: a held-out part must not be read."""
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(dataset, list(sampler.indices))
    if not isinstance(sampler, _WHOLE):
        raise DataError(
            f"the training images are drawn by a {type(sampler).__name__}, whose choice is not known; give data=LOADER "
            "with the images that the statistics shall be of"
        )
    return dataset


def _ranks() -> tuple[int, int]:
    """How many processes train together, and which this is."""
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_world_size(), torch.distributed.get_rank()) if known else (1, 0)


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Within this block draws come from a fixed seed; after it all generators go on as if it had not run."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_SEED)
            random.seed(_SEED)
            np.random.seed(_SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


def in_evaluation_weights(optimizer: Any) -> None:
    """Lets a schedule-free optimizer put the weights that are evaluated into the network, which others do not need.

    They stay there: trainers that know such optimizers switch back before their next step, and going to and fro rounds.
    """
    switch: Callable[[], None] | None = getattr(optimizer, "eval", None)
    if callable(switch):
        switch()
