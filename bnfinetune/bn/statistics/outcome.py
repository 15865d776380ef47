"""From a finished pass to new statistics, the report on them, and the model's buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnfinetune.bn.population import RunningStats, population_of
from bnfinetune.bn.statistics.collectives import ProcessGroup, share
from bnfinetune.bn.statistics.label_order import is_read_in_stored_order
from bnfinetune.bn.statistics.moments import all_reduce_moments
from bnfinetune.bn.statistics.report import LayerChange, layer_change
from bnfinetune.bn.statistics.sampling_error import MIN_GROUPS, SamplingError
from bnfinetune.bn.statistics.statistics_pass import LayerStatistics, Limits, Pass
from bnfinetune.errors import StatisticsError

_NOTABLE_CORRELATION = 0.3


class NewStatistics(NamedTuple):
    """What one layer's statistics become; the same on all ranks.

    Attributes:
        mean: shape (C,), float64.
        var: shape (C,), float64.
        values: values per channel behind them.
        calls: how often the layer was called on the rank where that was most.
        reread: whether inputs were read a second time on any rank.
        error: estimated error; None if unknown.
    """

    mean: Tensor
    var: Tensor
    values: float
    calls: int
    reread: bool
    error: SamplingError | None


def new_statistics(
    run: Pass, statistics: Mapping[str, LayerStatistics], with_errors: bool, group: ProcessGroup = None
) -> dict[str, NewStatistics]:
    """Works out the statistics of all ranks together; layers that no batch reached are left out.

    Args:
        run: the finished pass.
        statistics: this rank's part, layer by layer.
        with_errors: whether the pooled moments' errors are those of the statistics.
        group: the process group; the default group if None.
    """
    pooled = run.moments()
    own = all_reduce_moments([layer.estimator.moments() for layer in statistics.values()], group)
    errors: Sequence[SamplingError | None] = run.errors(pooled) if with_errors else [None] * len(pooled)
    calls, reread = _over_ranks(list(statistics.values()), group)
    new = {}
    for i, (name, layer) in enumerate(statistics.items()):
        if pooled[i].count:
            mean, var = layer.estimator.result(pooled[i], own[i])
            new[name] = NewStatistics(mean, var, pooled[i].count, int(calls[i]), bool(reread[i]), errors[i])
    return new


def _over_ranks(layers: Sequence[LayerStatistics], group: ProcessGroup) -> tuple[list[float], list[float]]:
    numbers = [float(layer.calls) for layer in layers] + [float(layer.recorder.reread or False) for layer in layers]
    most = [max(by_rank) for by_rank in zip(*share(lambda: numbers, len(numbers), group), strict=True)]
    return most[: len(layers)], most[len(layers) :]


def changes(statistics: Mapping[str, LayerStatistics], new: Mapping[str, NewStatistics]) -> dict[str, LayerChange]:
    """Compares new statistics with those that the model still holds."""
    return {
        name: layer_change(
            tuple(t.detach().cpu().double() for t in _buffers(statistics[name])[:2]),  # type: ignore[arg-type]
            (stats.mean, stats.var),
            statistics[name].eps,
            stats.values,
            stats.error,
            stats.reread,
        )
        for name, stats in new.items()
    }


def write(statistics: Mapping[str, LayerStatistics], new: Mapping[str, NewStatistics], count_batches: bool) -> None:
    """Writes new statistics into the model's buffers, all of them in one step.

    Args:
        statistics: the layers.
        new: what becomes of those that were called.
        count_batches: whether `num_batches_tracked` grows by the calls.

    Raises:
        StatisticsError: a value is not finite in the buffer's dtype; nothing is written.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, stats in new.items():
        buffers = _buffers(statistics[name])
        for key, buffer, value in (("mean", buffers.mean, stats.mean), ("variance", buffers.var, stats.var)):
            cast = value.to(buffer.device, buffer.dtype).reshape(buffer.shape)
            if not cast.isfinite().all():
                raise StatisticsError(
                    f"BN layer {name!r} would get a {key} that is not finite in {buffer.dtype}; keep its buffers in "
                    "float32, give batches of more than one value per channel, or look for damaged inputs"
                )
            pairs.append((buffer, cast))
        if count_batches and (counter := buffers[2]) is not None:
            pairs.append((counter, counter + stats.calls))
    if pairs:
        # One call, which Python signals cannot interrupt half-way: all buffers change, or none.
        torch._foreach_copy_([buffer for buffer, _ in pairs], [value for _, value in pairs])


def doubts(run: Pass, new: Mapping[str, NewStatistics], limits: Limits, data: Any) -> tuple[str, ...]:
    """Reasons not to trust that a tolerance was reached; none without a tolerance."""
    if limits.tolerance is None:
        return ()
    errors = {name: stats.error for name, stats in new.items() if stats.error is not None}
    found = []
    worst = max(errors, key=lambda name: errors[name].worst, default=None)
    if not run.stopped_early and worst is not None and errors[worst].worst > limits.tolerance:
        found.append(
            f"tolerance={limits.tolerance:g} was not reached: {run.samples} samples leave an estimated error of "
            f"{errors[worst].worst:.2g} (BN layer {worst!r}); give more data or a larger tolerance"
        )
    if run.batches < MIN_GROUPS:
        found.append(
            f"only {run.batches} batches: their spread says little about the error; "
            f"use at least {MIN_GROUPS}, if need be of fewer samples"
        )
    if run.labels.is_sorted:
        found.append(
            "batches come sorted by class, so the estimated error says nothing about classes still to come, and the "
            "pass did not stop early; shuffle the data"
        )
    elif errors and (correlation := median(error.correlation for error in errors.values())) > _NOTABLE_CORRELATION:
        found.append(
            f"neighbouring batches resemble each other (correlation {correlation:.2f}), as in sorted data; "
            "the estimated error allows for that, but shuffled data would need fewer samples"
        )
    if run.stopped_early and not run.labels.seen and is_read_in_stored_order(data):
        found.append(
            "the loader reads its data set in stored order and stopped before the end; if that order is not random, "
            "the statistics are not those of the whole set: use shuffle=True"
        )
    return tuple(found)


def _buffers(layer: LayerStatistics) -> RunningStats:
    return population_of(layer.recorder.layer).require_stats()
