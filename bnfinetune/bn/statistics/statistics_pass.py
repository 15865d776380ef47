"""One pass over the data with fixed weights: reading batches, running the model, stopping in time, on all ranks alike.

Ranks talk to each other between batches, never within: each runs on its own for some batches, then all exchange how
far they are and whether anything went wrong. A rank that has run out of data stays in the exchange until all are done.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from bnfinetune.bn.statistics.batches import Batch, BatchReader, first_samples, labels_of
from bnfinetune.bn.statistics.collectives import ProcessGroup, is_distributed, share
from bnfinetune.bn.statistics.label_order import LabelOrder
from bnfinetune.bn.statistics.layer_statistics import LayerStatistics, NewStatistics
from bnfinetune.bn.statistics.moments import Moments, all_reduce_moments
from bnfinetune.bn.statistics.recorder import BLOCK, drain
from bnfinetune.bn.statistics.sampling_error import MIN_GROUPS, SamplingError, sampling_errors
from bnfinetune.errors import ShortDataError, StatisticsError


@dataclass(frozen=True)
class Limits:
    """When a pass ends: at the first limit reached, or at the end of the data.

    Attributes:
        num_batches: batches on each rank.
        num_samples: samples over all ranks; the last batch is cut to reach the number exactly.
        tolerance: estimated standard error of the worst channel of any layer.
    """

    num_batches: int | None = None
    num_samples: int | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_batches", "num_samples"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise StatisticsError(
                    f"{name}={value!r}; give a whole number of at least 1, or None for all of the data"
                )
        if self.tolerance is not None and not 0 < self.tolerance < float("inf"):
            raise StatisticsError(f"tolerance={self.tolerance!r}; give a standard error above 0, such as 0.01")
        if self.num_batches is not None and self.num_samples is not None:
            raise StatisticsError("num_batches and num_samples are both given; choose one of them")


class Pass:
    """One pass over the data; `run` feeds the recorders until a limit is reached.

    Args:
        call: runs the model on a batch.
        data: the batches.
        statistics: where the layers' batches go, by name.
        limits: when to stop.
        progress: whether rank 0 shows a progress bar.
        drop_padding: whether rows that loaders repeat to even out the ranks are left out.
        group: the process group; the default group if None.

    Attributes:
        batches: batches run, over all ranks once `run` is over.
        samples: samples run, likewise; batches whose samples cannot be told count none.
        stopped_early: whether the tolerance ended the pass.
        labels: what the labels in the batches say of their order; followed only under a tolerance.
        views: tensors of images in each batch so far, at most; one is read.
    """

    def __init__(
        self,
        call: Callable[[Any], object],
        data: Any,
        statistics: Mapping[str, LayerStatistics],
        limits: Limits,
        *,
        progress: bool = False,
        drop_padding: bool = True,
        group: ProcessGroup = None,
    ) -> None:
        self._call = call
        self._reader = BatchReader(data, drop_padding=drop_padding)
        self._statistics = statistics
        self._limits = limits
        self._group = group
        self._bar = tqdm(
            desc="precise BN",
            total=limits.num_batches or (len(data) if hasattr(data, "__len__") else None),
            disable=not progress or (is_distributed(group) and dist.get_rank(group) != 0),
        )
        self._ahead: Batch | None = None
        self._pending = 0
        self._stride = BLOCK if limits.tolerance is None else 1
        self._next_check = MIN_GROUPS
        self.batches = 0
        self.samples = 0
        self.stopped_early = False
        self.labels = LabelOrder()

    def run(self) -> None:
        """Reads and runs batches until a limit is reached on all ranks.

        Raises:
            ShortDataError: the data ended before `num_batches` or `num_samples`.
            StatisticsError: no data, activations that are not finite, or a fault on another rank.
        """
        with self._bar:
            if self._limits.num_samples is None:
                self._run_batches()
            else:
                self._run_samples(self._limits.num_samples)
        totals = share(self._finish, 2, self._group)
        self.batches, self.samples = (int(sum(numbers)) for numbers in zip(*totals, strict=True))
        if not self.batches:
            raise StatisticsError("the data holds no batch; check the loader (a generator can be read only once)")

    @property
    def views(self) -> int:
        return self._reader.views

    def new_statistics(self, with_errors: bool) -> dict[str, NewStatistics]:
        """Works out the statistics of all ranks together; layers that no batch reached are left out.

        Args:
            with_errors: whether the pooled moments' errors are those of the statistics.
        """
        layers = list(self._statistics.values())
        pooled = self._moments()
        own = all_reduce_moments([layer.estimator.moments() for layer in layers], self._group)
        errors: Sequence[SamplingError | None] = self._errors(pooled) if with_errors else [None] * len(pooled)
        numbers = [float(number) for layer in layers for number in (layer.calls, layer.recorder.reread or False)]
        by_rank = share(lambda: numbers, len(numbers), self._group)
        most = [max(ranks) for ranks in zip(*by_rank, strict=True)]
        return {
            name: NewStatistics(
                *layers[i].estimator.result(pooled[i], own[i]),
                values=pooled[i].count,
                calls=int(most[2 * i]),
                reread=bool(most[2 * i + 1]),
                error=errors[i],
            )
            for i, name in enumerate(self._statistics)
            if pooled[i].count
        }

    def _moments(self) -> list[Moments]:
        """The moments of all values, layer by layer, over all ranks."""
        return all_reduce_moments([layer.groups.moments() for layer in self._statistics.values()], self._group)

    def _errors(self, pooled: Sequence[Moments]) -> list[SamplingError]:
        """The estimated errors of these moments, layer by layer."""
        layers = self._statistics.values()
        return sampling_errors([layer.groups for layer in layers], pooled, [layer.eps for layer in layers], self._group)

    def _run_batches(self) -> None:
        for step in itertools.count(1):
            ranks = share(self._run_some, 2, self._group)
            if not any(has_more for has_more, _ in ranks):
                return
            if self._is_sure(step, any(is_sorted for _, is_sorted in ranks)):
                return

    def _run_some(self) -> tuple[float, float]:
        """Runs a few batches; says whether there may be more, and whether they look sorted by class."""
        limit, before = self._limits.num_batches, self.batches
        for _ in range(self._stride):
            if self.batches == limit:
                break
            batch = self._reader.next_batch()
            if batch is None:
                if limit is not None:
                    raise ShortDataError(
                        f"the data ended after {self.batches} batches, before num_batches={limit}; "
                        "ask for fewer, or give more data"
                    )
                break
            self._run_one(batch)
        has_more = self.batches - before == self._stride and self.batches != limit
        self._collect()
        return has_more, self.labels.is_sorted

    def _run_samples(self, wanted: int) -> None:
        rank = dist.get_rank(self._group) if is_distributed(self._group) else 0
        total = 0
        for step in itertools.count(1):
            held = [int(samples) for (samples,) in share(self._look_ahead, 1, self._group)]
            if not any(held):
                raise ShortDataError(
                    f"the data ended after {total} samples, before num_samples={wanted}; "
                    "ask for fewer, or give more data"
                )
            mine = min(max(wanted - total - sum(held[:rank]), 0), held[rank])
            ranks = share(partial(self._run_ahead, mine), 1, self._group)
            total += sum(held)
            if total >= wanted or self._is_sure(step, any(is_sorted for (is_sorted,) in ranks)):
                return

    def _look_ahead(self) -> tuple[int]:
        """Reads the next batch, to be run by `_run_ahead`; gives its samples, 0 at the end of the data."""
        self._ahead = self._reader.next_batch()
        if self._ahead is None:
            return (0,)
        if self._ahead.samples is None:
            raise StatisticsError(
                "num_samples needs batches with tensors whose first dimension counts samples; use num_batches instead"
            )
        return (self._ahead.samples,)

    def _run_ahead(self, samples: int) -> tuple[float]:
        """Runs the first samples of the batch that was read ahead; says whether batches look sorted by class."""
        if samples and self._ahead is not None:
            self._run_one(Batch(first_samples(self._ahead.data, samples), samples))
        return (self.labels.is_sorted,)

    def _run_one(self, batch: Batch) -> None:
        self._call(batch.data)
        if self._limits.tolerance is not None and (labels := labels_of(batch.data)) is not None:
            self.labels.add(labels)
        self.batches += 1
        self.samples += batch.samples or 0
        self._pending += 1
        self._bar.update()
        # the first batch at once: it shows which layers must be read again
        if self.batches == 1 or self._pending == self._stride:
            self._collect()

    def _collect(self) -> None:
        if self._pending:
            rows = drain({name: layer.recorder for name, layer in self._statistics.items()})
            for name in rows:
                self._statistics[name].add(rows[name], self._pending)
            self._pending = 0

    def _finish(self) -> tuple[int, int]:
        self._collect()
        return self.batches, self.samples

    def _is_sure(self, step: int, is_sorted: bool) -> bool:
        """Whether all layers are within the tolerance; asked now and then, by all ranks at the same steps."""
        if self._limits.tolerance is None or step < self._next_check:
            return False
        self._next_check = step + max(2, step // 10)
        pooled = self._moments()
        called = [error for error, part in zip(self._errors(pooled), pooled, strict=True) if part.count]
        enough = all(error.groups >= MIN_GROUPS and error.worst <= self._limits.tolerance for error in called)
        self.stopped_early = enough and bool(called) and not is_sorted
        return self.stopped_early
