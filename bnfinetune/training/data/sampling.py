"""Which images make which batch: as a function of seed, epoch and position, whatever the number of ranks or workers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from bnfinetune.errors import DataError
from bnfinetune.training.data.seeding import derive_seed

_ORDER = 4  # stream of random draws


class Pick(NamedTuple):
    """An image asked of a loader: its number, the epoch that seeds its augmentation and, of a stream, its row."""

    epoch: int
    number: int
    row: Mapping[str, Any] | None = None


class TrainSampler(Sampler[list[Pick]]):
    """Shuffled batches of one rank, equally many on all ranks.

    The permutation of an epoch is cut into global batches of `world_size * batch_size` images, of which each rank takes
    a run of `batch_size`. The ranks' batches of one number, taken together, are therefore the same images for any
    number of ranks that keeps the global batch. The last, short global batch is divided as evenly as possible.

    Args:
        length: Number of images.
        batch_size: Images per batch and rank.
        seed: Seed of the permutations.
        rank: Number of this process.
        world_size: Number of processes.
        spread: Kind of each image, of shape `(length,)`; kinds are then spread evenly over the permutation, so that a
            run of n images holds n times a kind's share of them, give or take one. None for no kinds.
        even: Cut the permutation into batches of even size instead, so that none is short and no image is left out.

    Raises:
        DataError: There are fewer images than ranks.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        spread: NDArray[np.int64] | None = None,
        even: bool = False,
    ) -> None:
        if length < world_size:
            raise DataError(f"{length} training images cannot feed {world_size} processes: start fewer")
        self.length, self.batch_size, self.seed, self.rank, self.world_size = length, batch_size, seed, rank, world_size
        self.spread = None if spread is None else torch.from_numpy(spread)
        self.batches = _cut(length, world_size * batch_size, least=world_size if even else None)
        self.epoch = 0
        self.start = 0
        self.drop_remainder(1)

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.batches)

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let iterations begin at a batch of an epoch, until told otherwise."""
        self.epoch, self.start = epoch, batch

    def drop_remainder(self, min_size: int) -> int:
        """Leave out the last global batch if it would give a rank fewer than `min_size` images.

        Returns:
            How many images each epoch leaves out (other ones in every epoch).

        Raises:
            DataError: There is no other batch.
        """
        start, stop = self.batches[-1]
        smallest = (stop - start) // self.world_size
        if smallest >= min_size:
            return self.length - stop
        if len(self.batches) == 1:
            raise DataError(
                f"{self.length} training images give {smallest} per process, fewer than {min_size} in every batch: "
                "add images or start fewer processes"
            )
        self.batches.pop()
        return self.length - start

    def __iter__(self) -> Iterator[list[Pick]]:
        epoch, start = self.epoch, self.start
        generator = torch.Generator().manual_seed(derive_seed(self.seed, _ORDER, epoch))
        order = torch.randperm(self.length, generator=generator)
        if self.spread is not None:
            order = order[_even_positions(self.spread[order]).argsort(stable=True)]
        for begin, end in self.batches[start:]:
            share = order[begin:end].tensor_split(self.world_size)[self.rank]
            yield [Pick(epoch, number) for number in share.tolist()]


class EvalSampler(Sampler[list[Pick]]):
    """Every `world_size`-th image, each on exactly one rank, in batches of up to `batch_size`.

    The images come in stored order, or in a random one that `seed` fixes.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        self.length, self.batch_size = length, batch_size
        order: Sequence[int] = range(length)
        if seed is not None:
            generator = torch.Generator().manual_seed(derive_seed(seed, _ORDER, 0))
            order = torch.randperm(length, generator=generator).tolist()
        self.numbers = order[rank::world_size]

    def __len__(self) -> int:
        """Batches of this rank; another rank may have one more."""
        return math.ceil(len(self.numbers) / self.batch_size)

    def __iter__(self) -> Iterator[list[Pick]]:
        for begin in range(0, len(self.numbers), self.batch_size):
            yield [Pick(0, number) for number in self.numbers[begin : begin + self.batch_size]]


def _even_positions(kinds: Tensor) -> Tensor:
    """Places from 0 to 1 that spread each kind evenly and keep the order within it."""
    places = torch.empty(len(kinds), dtype=torch.float64)
    for kind in kinds.unique():
        rows = (kinds == kind).nonzero().flatten()
        places[rows] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return places


def _cut(length: int, size: int, least: int | None) -> list[tuple[int, int]]:
    """Bounds of the global batches: of `size` and a rest, or where `least` is given, of even size and at least that."""
    count = math.ceil(length / size)
    if least is None:
        edges = [*range(0, length, size), length]
    else:
        count = min(count, length // least)
        edges = [length * number // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))
