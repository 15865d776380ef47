"""Which images make which batch: as a function of seed, epoch and position, whatever the number of ranks or workers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Sampler

from bnfinetune.errors import DataError
from bnfinetune.training.data.hints import first_line
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
        even: Cut the permutation into batches of even size instead, so that none is short and no image is left out.

    Raises:
        DataError: There are fewer images than ranks.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1, even: bool = False
    ) -> None:
        if length < world_size:
            raise DataError(f"{length} training images cannot feed {world_size} processes: start fewer")
        self.length, self.batch_size, self.seed, self.rank, self.world_size = length, batch_size, seed, rank, world_size
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
        for begin, end in self.batches[start:]:
            share = order[begin:end].tensor_split(self.world_size)[self.rank]
            yield [Pick(epoch, number) for number in share.tolist()]


class EvalSampler(Sampler[list[Pick]]):
    """Every `world_size`-th image in order, each on exactly one rank, in batches of up to `batch_size`."""

    def __init__(self, length: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.numbers = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Batches of this rank; another rank may have one more."""
        return math.ceil(len(self.numbers) / self.batch_size)

    def __iter__(self) -> Iterator[list[Pick]]:
        for begin in range(0, len(self.numbers), self.batch_size):
            yield [Pick(0, number) for number in self.numbers[begin : begin + self.batch_size]]


class StreamSampler(Sampler[list[Pick]]):
    """Batches of rows read from a stream in the main process, and decoded wherever they are sent.

    Reading in one place makes the order independent of the number of workers, and a resume exact: rows before the
    position are read and thrown away, undecoded. A stream whose shards divide evenly among the ranks is read in
    disjoint parts; of any other, each rank reads all and keeps its share.

    Args:
        stream: A `datasets.IterableDataset` with undecoded images.
        batch_size: Images per batch and rank.
        rank: Number of this process.
        world_size: Number of processes.
        shuffle: Seed and buffer size, or None to keep the order.
        endless: Begin again at the end, in another order. Ranks then never run out at different times; there is one
            epoch only, whose batches are numbered on.
    """

    def __init__(
        self,
        stream: Any,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: tuple[int, int] | None = None,
        endless: bool = False,
    ) -> None:
        if world_size > 1 and stream.num_shards % world_size == 0:
            stream = stream.shard(world_size, rank)  # before shuffling: the length of a pass stays the same
        elif world_size > 1:
            stream = split_dataset_by_node(stream, rank, world_size)
        if shuffle is not None:
            seed, buffer_size = shuffle
            stream = stream.shuffle(seed=derive_seed(seed, _ORDER), buffer_size=buffer_size)
        self.stream, self.batch_size, self.rank, self.world_size = stream, batch_size, rank, world_size
        self.endless = endless
        self.start = 0

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration begin at a batch; the only epoch is 0."""
        if epoch != 0:
            raise ValueError("a stream has one endless epoch: number its batches on")
        self.start = batch

    def drop_remainder(self, min_size: int) -> int:
        """Images left out of each epoch: none, since an endless stream has no short batch."""
        return 0

    def __iter__(self) -> Iterator[list[Pick]]:
        batch: list[Pick] = []
        for pick in self._picks(self.start * self.batch_size):
            batch.append(pick)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _picks(self, skip: int) -> Iterator[Pick]:
        """Rows of this rank from number `skip` on, over all passes."""
        turn, length = 0, 0
        while turn == 0 or self.endless:
            if length:  # known after the first pass: whole passes need not be read to be skipped
                turn, skip = turn + skip // length, skip % length
            length = 0
            self.stream.set_epoch(turn)
            for row in self._rows():
                length += 1
                if skip:
                    skip -= 1
                else:
                    yield Pick(turn, (length - 1) * self.world_size + self.rank, row)
            if length == 0:
                raise DataError("the stream has no image for every process: start fewer processes")
            turn += 1

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        try:
            yield from self.stream
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"the stream cannot be read on: {first_line(error)}") from error


def _cut(length: int, size: int, least: int | None) -> list[tuple[int, int]]:
    """Bounds of the global batches: of `size` and a rest, or where `least` is given, of even size and at least that."""
    count = math.ceil(length / size)
    if least is None:
        edges = [*range(0, length, size), length]
    else:
        count = min(count, length // least)
        edges = [length * number // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))
