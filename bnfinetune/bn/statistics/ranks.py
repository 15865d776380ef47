"""Running statistics of several ranks made one.

Under data-parallel training each rank's BN layers follow the rank's own batches; DDP then copies rank 0's buffers over
the others', so what the other ranks saw is lost, and before the next forward the ranks disagree. Averaging means and
variances (timm's `--dist-bn reduce`) loses the spread between the ranks' means: two shards of variance 1 with means
0 and 2 average to variance 1, where the pooled variance is 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.population import RunningStats
from bnfinetune.bn.saved_report import SavedReport
from bnfinetune.bn.statistics.collectives import (
    ProcessGroup,
    gather_in_rank_order,
    is_distributed,
    require_same_layers,
    together,
)
from bnfinetune.bn.statistics.moments import Moments
from bnfinetune.bn.statistics.transfers import fetch, store
from bnfinetune.errors import StatisticsError


@dataclass(frozen=True)
class MergeReport(SavedReport):
    """What `merge_running_stats` did; `print(report)` shows it, `report.save(path)` writes JSON.

    Attributes:
        counts: images that each rank's statistics stood for, in rank order; a single process has nothing to merge.
        apart: how far the ranks were apart, by layer: the largest distance of any rank's mean from the merged one, of
            any channel, in merged standard deviations. Ranks without images do not count.
    """

    counts: tuple[float, ...]
    apart: dict[str, float]

    def __str__(self) -> str:
        if not self.apart:
            return "running statistics of one process: nothing to merge"
        worst = max(self.apart, key=lambda name: self.apart[name])
        return (
            f"running statistics of {len(self.counts)} ranks merged in {len(self.apart)} layers "
            f"({sum(self.counts):g} images: {' + '.join(f'{count:g}' for count in self.counts)}); means were up to "
            f"{self.apart[worst]:.2g} standard deviations apart ({worst})"
        )


@torch.no_grad()
def merge_running_stats(model: nn.Module, count: float, process_group: ProcessGroup = None) -> MergeReport:
    """Gives every rank the pooled running statistics of all ranks, by the law of total variance.

    With `w_r` the share of rank r in the images seen: `m = sum_r w_r m_r`, `v = sum_r w_r (v_r + (m_r - m)^2)`.
    The result has the same bits on every rank; without process group nothing changes. Buffers are written in place.
    `num_batches_tracked` becomes the largest of the ranks'. A collective: all ranks must call it.

    Args:
        model: the model, wrapped (DDP, `torch.compile`) or not; every BN layer with running statistics takes part,
            with those of its domains.
        count: how many images this rank's statistics stand for; may be 0, as long as some rank's is not.
        process_group: the ranks to merge; the default group if None.

    Returns:
        A report, the same on all ranks; print it, or save it as JSON.

    Raises:
        StatisticsError: on all ranks, nothing changed: negative counts, no images on any rank, running statistics
            that are not finite on some rank (the layer is named), or different BN layers on different ranks.
    """
    if not is_distributed(process_group):
        return MergeReport((float(count),), {})
    layers = find_bn_layers(model)
    kept = {name: stats for name, layer in layers.items() if (stats := list(_populations(layer)))}
    values = together(lambda: _checked(kept, count), process_group)
    require_same_layers({name: [len(s.mean) for s in stats] for name, stats in kept.items()}, process_group)
    rows = gather_in_rank_order(torch.cat([value.reshape(-1) for value in values]), process_group)
    counts, *parts = torch.split(rows, [value.numel() for value in values], dim=1)
    if not counts.sum():
        raise StatisticsError("no rank has seen an image (count=0 everywhere); merge after the first training batch")
    names = [name for name, stats in kept.items() for _ in stats]
    apart, merged = dict.fromkeys(kept, 0.0), []
    for name, means, variances, batches in zip(names, parts[::3], parts[1::3], parts[2::3], strict=True):
        pooled = Moments.pool(counts[:, 0], means, variances * counts)
        off = (means - pooled.mean)[counts[:, 0] > 0].abs().max(0).values
        # where all ranks hold one constant, they are no deviation apart
        apart[name] = max(apart[name], float(torch.where(off > 0, off / pooled.var.sqrt(), 0.0).max()))
        merged += [pooled.mean, pooled.var, batches.max()]
    buffers = [buffer for stats in kept.values() for each in stats for buffer in each]
    pairs = [(buffer, value) for buffer, value in zip(buffers, merged, strict=True) if buffer is not None]
    store([buffer for buffer, _ in pairs], [value for _, value in pairs])
    return MergeReport(tuple(counts[:, 0].tolist()), apart)


def _populations(layer: nn.Module) -> Iterator[RunningStats]:
    """The layer's own running statistics, and those of each domain."""
    buffers = layer._buffers
    for key in buffers:
        if key.endswith("running_mean"):
            prefix = key.removesuffix("running_mean")
            mean, var = buffers[key], buffers[f"{prefix}running_var"]
            if mean is not None and var is not None:
                yield RunningStats(mean, var, buffers.get(f"{prefix}num_batches_tracked"))


def _checked(populations: Mapping[str, Sequence[RunningStats]], count: float) -> list[Tensor]:
    """The count, and mean, variance and batches of every population, float64 on the CPU."""
    if not (count >= 0 and math.isfinite(count)):
        raise StatisticsError(f"count={count} images; pass how many images this rank's running statistics stand for")
    none = torch.zeros((), dtype=torch.float64, device="cpu")
    flat = [none if buffer is None else buffer for stats in populations.values() for each in stats for buffer in each]
    values = fetch(flat)
    rest = iter(values)
    for name, stats in populations.items() if count else ():
        for _ in stats:
            for key, value in zip(("mean", "var", ""), (next(rest), next(rest), next(rest)), strict=True):
                if key and not value.isfinite().all():
                    raise StatisticsError(
                        f"BN layer {name!r} has a running_{key} that is not finite; roll back to statistics from "
                        "before the overflow, or recompute them with precise_bn"
                    )
    return [torch.tensor([float(count)], dtype=torch.float64, device="cpu"), *values]
