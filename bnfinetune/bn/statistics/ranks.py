"""Running statistics of several ranks made one.

Under data-parallel training each rank's BN layers follow the rank's own batches; DDP then copies rank 0's buffers over
the others', so what the other ranks saw is lost, and before the next forward the ranks disagree. Averaging means and
variances (timm's `--dist-bn reduce`) loses the spread between the ranks' means: two shards of variance 1 with means
0 and 2 average to variance 1, where the pooled variance is 2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.population import RunningStats
from bnfinetune.bn.statistics.collectives import ProcessGroup, gather_in_rank_order, is_distributed, together
from bnfinetune.bn.statistics.moments import Moments
from bnfinetune.errors import StatisticsError


@torch.no_grad()
def merge_running_stats(model: nn.Module, count: float, process_group: ProcessGroup = None) -> None:
    """Gives every rank the pooled running statistics of all ranks, by the law of total variance.

    With `w_r` the share of rank r in the images seen: `m = sum_r w_r m_r`, `v = sum_r w_r (v_r + (m_r - m)^2)`.
    The result has the same bits on every rank; without process group nothing changes. Buffers are written in place.
    `num_batches_tracked` becomes the largest of the ranks'. A collective: all ranks must call it.

    Args:
        model: the model, wrapped (DDP, `torch.compile`) or not; every BN layer with running statistics takes part,
            with those of its domains.
        count: how many images this rank's statistics stand for; may be 0, as long as some rank's is not.
        process_group: the ranks to merge; the default group if None.

    Raises:
        StatisticsError: on all ranks, nothing changed: negative counts, no images on any rank, running statistics
            that are not finite on some rank (the layer is named), or different BN layers on different ranks.
    """
    if not is_distributed(process_group):
        return
    layers = find_bn_layers(model)
    kept = {name: stats for name, layer in layers.items() if (stats := list(_populations(layer)))}
    together(lambda: _check(kept, count), process_group)
    require_same_layers({name: [len(s.mean) for s in stats] for name, stats in kept.items()}, process_group)
    merged = _merge([s for stats in kept.values() for s in stats], count, process_group)
    # One call that Python signals cannot interrupt half-way: all buffers change, or none.
    torch._foreach_copy_([old for old, _ in merged], [new for _, new in merged])


def require_same_layers(channels: Mapping[str, object], group: ProcessGroup = None) -> None:
    """Makes sure that all ranks hold the same BN layers, before their statistics are laid side by side.

    Args:
        channels: the number of channels by the layer's qualified name, or anything else that must agree.
        group: the process group; the default group if None.

    Raises:
        StatisticsError: on all ranks, if names or channels differ on some.
    """
    digest = torch.frombuffer(bytearray(hashlib.sha256(repr(dict(channels)).encode()).digest()), dtype=torch.uint8)
    rows = gather_in_rank_order(digest, group)
    if (rows != rows[0]).any():
        rank = int((rows != rows[0]).any(1).int().argmax())
        raise StatisticsError(
            f"rank {rank} has other BN layers than rank 0 ({len(channels)} on this rank); "
            "give every rank the same model and the same selection"
        )


def _populations(layer: nn.Module) -> Iterator[RunningStats]:
    """The layer's own running statistics, and those of each domain."""
    buffers = layer._buffers
    for key in buffers:
        if key.endswith("running_mean"):
            prefix = key.removesuffix("running_mean")
            mean, var = buffers[key], buffers[f"{prefix}running_var"]
            if mean is not None and var is not None:
                yield RunningStats(mean, var, buffers.get(f"{prefix}num_batches_tracked"))


def _check(populations: Mapping[str, Sequence[RunningStats]], count: float) -> None:
    if not (count >= 0 and math.isfinite(count)):
        raise StatisticsError(f"count={count} images; pass how many images this rank's running statistics stand for")
    for name, stats in populations.items() if count else ():
        for key in ("mean", "var"):
            if not all(getattr(s, key).isfinite().all() for s in stats):
                raise StatisticsError(
                    f"BN layer {name!r} has a running_{key} that is not finite; roll back to statistics from before "
                    "the overflow, or recompute them with precise_bn"
                )


def _merge(populations: Sequence[RunningStats], count: float, group: ProcessGroup) -> list[tuple[Tensor, Tensor]]:
    """Pairs of each buffer and its merged value."""
    counters = [counter for stats in populations if (counter := stats[2]) is not None]
    flat = [torch.tensor([float(count)]), *counters, *(buffer for stats in populations for buffer in stats[:2])]
    rows = gather_in_rank_order(torch.cat([t.detach().cpu().double().reshape(-1) for t in flat]), group)
    weights, *parts = torch.split(rows, [t.numel() for t in flat], dim=1)
    if not weights.sum():
        raise StatisticsError("no rank has seen an image (count=0 everywhere); merge after the first training batch")
    pairs = [(old, new.max()) for old, new in zip(counters, parts, strict=False)]
    buffers = parts[len(counters) :]
    for stats, means, variances in zip(populations, buffers[::2], buffers[1::2], strict=True):
        pooled = Moments.pool(weights[:, 0], means, variances * weights)
        pairs += [(stats.mean, pooled.mean), (stats.var, pooled.var)]
    return [(old, new.to(old.device, old.dtype).reshape(old.shape)) for old, new in pairs]
