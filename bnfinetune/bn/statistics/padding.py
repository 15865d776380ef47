"""Rows that a loader repeats so that all ranks get equally many: found by position, to be left out of statistics.

Recognised are loaders whose order is known to the last row:

- a `DataLoader` with torch's `DistributedSampler` or timm's `OrderedDistributedSampler`, which deal samples to ranks in
  turn and fill the last turn from the start of the data set;
- a loader prepared by Accelerate, in all its ways: whole batches dealt in turn, batches split between ranks, batches
  read on rank 0 and dispatched, and iterable data sets of known length; the same after `skip_first_batches`.

Any other loader counts as free of padding. Everything is read off attributes, so Accelerate need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

RealRows = Callable[[int, int], int]
"""How many leading rows of a batch are no repetition, from (batch number on this rank, rows in the batch)."""


def real_rows_of(loader: Any) -> RealRows:
    """The rule that tells a loader's samples from its padding."""
    for recognise in (_dispatched, _sharded_batches, _sharded_stream, _sampler_in_turn):
        rule = recognise(loader)
        if rule is not None:
            return _after_skipped(loader, rule)
    return lambda batch, rows: rows


def _after_skipped(loader: Any, rule: RealRows) -> RealRows:
    skipped = getattr(loader, "skip_batches", 0) + _batch_sampler(loader)[1]
    return lambda batch, rows: min(max(rule(batch + skipped, rows), 0), rows)


def _batch_sampler(loader: Any) -> tuple[Any, int]:
    """A loader's batch sampler below those with which accelerate skips first batches, and how many these skip."""
    dealt: Any = getattr(loader, "batch_sampler", None)
    skipped = 0
    while type(dealt).__name__ == "SkipBatchSampler":
        dealt, skipped = dealt.batch_sampler, skipped + dealt.skip_batches
    return dealt, skipped


def _sampler_in_turn(loader: Any) -> RealRows | None:
    """`DistributedSampler`: rank r holds the positions r, r + R, r + 2R, ... of the padded order."""
    batch_sampler: Any = _batch_sampler(loader)[0]
    if type(batch_sampler) is not BatchSampler or not isinstance(loader, DataLoader):
        return None
    sampler: Any = batch_sampler.sampler
    known = isinstance(sampler, DistributedSampler) and type(sampler).__iter__ is DistributedSampler.__iter__
    if not known and type(sampler).__name__ != "OrderedDistributedSampler":
        return None
    ranks, rank, size = sampler.num_replicas, sampler.rank, batch_sampler.batch_size
    real = -(-(len(sampler.dataset) - rank) // ranks)
    return lambda batch, rows: real - batch * size


def _sharded_batches(loader: Any) -> RealRows | None:
    """Accelerate's `BatchSamplerShard`: rank p of P takes batches p, p + P, ..., or the p-th part of every batch."""
    shard: Any = _batch_sampler(loader)[0]
    if type(shard).__name__ != "BatchSamplerShard" or type(shard.batch_sampler) is not BatchSampler:
        return None
    dealt: Any = shard.batch_sampler
    samples, size = len(dealt.sampler), dealt.batch_size
    ranks, rank = shard.num_processes, shard.process_index
    if shard.split_batches:
        return lambda batch, rows: samples - batch * size - rank * (size // ranks)
    return lambda batch, rows: samples - (batch * ranks + rank) * size


def _sharded_stream(loader: Any) -> RealRows | None:
    """Accelerate's `IterableDatasetShard`: like batches, but filled from an iterable data set."""
    shard: Any = getattr(loader, "dataset", None)
    if type(shard).__name__ != "IterableDatasetShard" or not hasattr(shard.dataset, "__len__"):
        return None
    samples, size, ranks, rank = len(shard.dataset), shard.batch_size, shard.num_processes, shard.process_index
    part = size // ranks if shard.split_batches else size
    if getattr(loader, "batch_size", None) != part:
        return None
    return lambda batch, rows: samples - (batch * ranks + rank) * part


def _dispatched(loader: Any) -> RealRows | None:
    """Accelerate's `DataLoaderDispatcher`: rank 0 reads; at the end it says how many rows the last batch really had."""
    if type(loader).__name__ != "DataLoaderDispatcher":
        return None

    def rule(batch: int, rows: int) -> int:
        return loader.remainder - loader.state.process_index * rows if loader.end_of_dataloader else rows

    return rule
