"""One layer's statistics in a pass: what its batches amount to on this rank, and what becomes of its buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnfinetune.bn.population import RunningStats, population_of
from bnfinetune.bn.statistics.estimators import EmaEstimate, Estimator, MeanEstimate, PooledEstimate
from bnfinetune.bn.statistics.moments import Rows
from bnfinetune.bn.statistics.recorder import LayerRecorder, recording
from bnfinetune.bn.statistics.sampling_error import BatchGroups, SamplingError
from bnfinetune.bn.statistics.transfers import fetch, store
from bnfinetune.errors import StatisticsError


class LayerStatistics:
    """What one layer's batches amount to on this rank.

    Args:
        recorder: the layer's recorder.
        channels: how many channels it has.
        estimator: how its statistics come about.
    """

    def __init__(self, recorder: LayerRecorder, channels: int, estimator: Estimator) -> None:
        self.recorder = recorder
        self.estimator = estimator
        self.groups = BatchGroups(channels)
        self.calls = 0

    @property
    def eps(self) -> float:
        """The layer's eps."""
        return self.recorder.eps

    @property
    def buffers(self) -> RunningStats:
        """The buffers that are to hold the result."""
        return population_of(self.recorder.layer).require_stats()

    def add(self, rows: Rows, batches: int) -> None:
        """Takes what was recorded of the last `batches` batches."""
        self.calls += len(rows.counts)
        self.estimator.add(rows)
        # Calls within one forward see the same images; only whole batches are independent of each other.
        calls, rest = divmod(len(rows.counts), batches)
        self.groups.add(rows if rest else rows.pooled(calls))


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


@contextmanager
def recorded(
    layers: Mapping[str, nn.Module], variance: str, momentum: float | None = None, share: float = 1.0
) -> Iterator[dict[str, LayerStatistics]]:
    """Records layers for the length of the block.

    Args:
        layers: the layers to update, by name.
        variance: the estimate: pooled, mean or ema.
        momentum: for ema; by default each layer's own.
        share: weight of a batch's statistics beside the stored in what the layers normalise by.
    """
    with recording(layers, share=share) as recorders:
        populations = [population_of(layer) for layer in layers.values()]
        stats = [population.require_stats() for population in populations]
        channels = [len(each.mean) for each in stats]
        made: list[Estimator] = [PooledEstimate() if variance == "pooled" else MeanEstimate(c) for c in channels]
        if variance == "ema":
            counters = [torch.zeros((), device="cpu") if each.batches is None else each.batches for each in stats]
            present = fetch([t for each, counter in zip(stats, counters, strict=True) for t in (*each[:2], counter)])
            starts = zip(present[::3], present[1::3], present[2::3], populations, strict=True)
            made = [EmaEstimate(m, v, int(k), momentum or own.momentum) for m, v, k, own in starts]
        yield {
            name: LayerStatistics(recorders[name], count, estimator)
            for name, count, estimator in zip(layers, channels, made, strict=True)
        }


def require_values(layers: Mapping[str, nn.Module], *, affine: bool = False) -> None:
    """Refuses layers whose tensors hold no values, as under accelerate's offloading.

    Args:
        layers: BN layers by name.
        affine: whether weight and bias are needed as well as the running statistics.

    Raises:
        StatisticsError: a tensor is on the meta device.
    """
    for name, layer in layers.items():
        population = population_of(layer)
        stats = population.stats
        named = {"running_mean": stats and stats.mean, "running_var": stats and stats.var}
        if affine:
            named |= {"weight": population.weight, "bias": population.bias}
        for key, tensor in named.items():
            if tensor is not None and tensor.device.type == "meta":
                raise StatisticsError(
                    f"BN layer {name!r} has its {key} on the meta device, where it holds no values; "
                    + ("load the model whole" if affine else "load the model whole, or offload no buffers")
                )


def held(statistics: Mapping[str, LayerStatistics], names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance, each (C,), that the model holds for these layers: float64 copies on the CPU."""
    names = list(names)
    tensors = fetch([buffer for name in names for buffer in statistics[name].buffers[:2]])
    return dict(zip(names, zip(tensors[::2], tensors[1::2], strict=True), strict=True))


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
        buffers = statistics[name].buffers
        for key, buffer, value in (("mean", buffers.mean, stats.mean), ("variance", buffers.var, stats.var)):
            if not value.to(buffer.dtype).isfinite().all():
                raise StatisticsError(
                    f"BN layer {name!r} would get a {key} that is not finite in {buffer.dtype}; keep its buffers in "
                    "float32, give batches of more than one value per channel, or look for damaged inputs"
                )
            pairs.append((buffer, value))
    if count_batches:
        counters = {name: counter for name in new if (counter := statistics[name].buffers.batches) is not None}
        present = fetch(list(counters.values()))
        pairs += [(counter, k + new[name].calls) for (name, counter), k in zip(counters.items(), present, strict=True)]
    store([buffer for buffer, _ in pairs], [value for _, value in pairs])
