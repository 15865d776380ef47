"""Batches from a stream: sets that are read in order, shard by shard, because they do not fit or have no known length.

The order of the rows is ours and not that of `datasets`, whose shuffling cannot be resumed exactly and waits for five
seconds at the end of every pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any, Final

import numpy as np
from torch.utils.data import Sampler

from bnfinetune.errors import DataError
from bnfinetune.training.data.hints import first_line
from bnfinetune.training.data.sampling import Pick
from bnfinetune.training.data.seeding import derive_seed

Row = Mapping[str, Any]

_OPEN_SHARDS: Final = 8  # read in turn, so that shards of one class each are mixed
_SHARD_ORDER, _ROW_ORDER = 7, 8  # streams of random draws


class StreamSampler(Sampler[list[Pick]]):
    """Batches of rows read from a stream in the main process, and decoded wherever they are sent.

    Reading in one place makes the order independent of the number of workers, and a resume exact: rows before the
    position are read and thrown away, undecoded. A stream whose shards divide evenly among the ranks is read in
    disjoint parts; of any other, each rank reads all and keeps its share.

    Shuffling takes the shards of a pass in random order, several at a time, through a buffer of rows from which a
    random one is taken for each one that comes in.

    Args:
        stream: A `datasets.IterableDataset` with undecoded images.
        batch_size: Images per batch and rank.
        rank: Number of this process.
        world_size: Number of processes.
        seed: Seed of the order; None keeps the order of the stream.
        buffer_size: Rows held for shuffling.
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
        seed: int | None = None,
        buffer_size: int = 1,
        endless: bool = False,
    ) -> None:
        self.stream, self.batch_size, self.rank, self.world_size = stream, batch_size, rank, world_size
        self.seed, self.buffer_size, self.endless = seed, buffer_size, endless
        self.start = 0

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let iterations begin at a batch, until told otherwise; the only epoch is 0."""
        if epoch != 0:
            raise ValueError("a stream has one endless epoch: number its batches on")
        self.start = batch

    def drop_remainder(self, min_size: int) -> int:
        """Images left out of each epoch: none, since an endless stream has no short batch."""
        return 0

    def __iter__(self) -> Iterator[list[Pick]]:
        picks = self._picks(self.start * self.batch_size)
        while batch := list(islice(picks, self.batch_size)):
            yield batch

    def _picks(self, skip: int) -> Iterator[Pick]:
        """Rows of this rank from number `skip` on, over all passes."""
        turn, length = 0, 0
        while turn == 0 or self.endless:
            if length:  # known after the first pass: whole passes need not be read to be skipped
                turn, skip = turn + skip // length, skip % length
            length = 0
            for row in self._pass(turn):
                length += 1
                if skip:
                    skip -= 1
                else:
                    yield Pick(turn, (length - 1) * self.world_size + self.rank, row)
            if length == 0 and self.endless:
                raise DataError("the stream has no image for every process: start fewer processes")
            turn += 1

    def _pass(self, turn: int) -> Iterator[Row]:
        """The rows of this rank in the order of one pass."""
        rows = self._share(turn)
        if self.seed is not None:
            rng = np.random.default_rng(derive_seed(self.seed, _ROW_ORDER, turn, self.rank))
            rows = _shuffled(rows, self.buffer_size, rng)
        try:
            yield from rows
        except DataError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # of readers of many kinds
            raise DataError(f"the stream cannot be read on: {first_line(error)}") from error

    def _share(self, turn: int) -> Iterator[Row]:
        """The rows of this rank, from whole shards where these divide evenly among the ranks."""
        count = self.stream.num_shards
        whole = count % self.world_size == 0
        shards = np.arange(self.rank, count, self.world_size) if whole else np.arange(count)
        if self.seed is not None:
            shards = np.random.default_rng(derive_seed(self.seed, _SHARD_ORDER, turn)).permutation(shards)
        readers = (iter(self.stream.shard(count, int(shard))) for shard in shards)
        rows = chain.from_iterable(readers) if self.seed is None else _in_turn(readers)
        return rows if whole else islice(rows, self.rank, None, self.world_size)


def _in_turn(readers: Iterator[Iterator[Row]]) -> Iterator[Row]:
    """One row of each open shard after the other; a shard that ends is replaced by the next."""
    running = list(islice(readers, _OPEN_SHARDS))
    while running:
        for reader in tuple(running):
            for row in islice(reader, 1):
                yield row
                break
            else:
                running.remove(reader)
                running.extend(islice(readers, 1))


def _shuffled(rows: Iterator[Row], size: int, rng: np.random.Generator) -> Iterator[Row]:
    """Rows in random order, as far as a buffer of `size` rows can bring it about."""
    buffer = list(islice(rows, size))
    for row in rows:
        place = int(rng.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = row
    for place in rng.permutation(len(buffer)):
        yield buffer[place]
