"""Rules about several processes: whose statistics these are, and who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bnfinetune.bn.population import population_of
from bnfinetune.bn.statistics.collectives import gather_in_rank_order
from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.registry import Trouble, rule
from bnfinetune.diagnose.trace import Trace

_HALVES = (torch.float16, torch.bfloat16)


@rule(
    "BN401",
    "processes hold different running statistics",
    "error",
    why="Each process evaluates another model, and only the one that saves is kept.",
    needs=("process_group",),
    rewatched=True,
)
def disagreeing_ranks(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Validation differs from GPU to GPU, and from the checkpoint.

    **Cause.** Each process updates its own buffers. DDP copies rank 0's over the others' at the next forward only, and
    with that throws away what the others saw.

    **Found by.** With `process_group`, the largest difference of any running mean or variance between processes, bit
    for bit. A collective: every process makes this call.

    ```python
    bnf.check_bn(model, process_group=dist.group.WORLD)        # the pitfall: after training, before evaluation

    from bnfinetune.bn.statistics.ranks import merge_running_stats  # repaired: pooled by the law of total variance
    merge_running_stats(model, count=images_seen_by_this_process)
    ```
    """
    stats = {name: found for name, layer in case.layers.items() if (found := population_of(layer).stats) is not None}
    flat = [torch.cat([each.mean.flatten(), each.var.flatten()]).double().cpu() for each in stats.values()]
    if not flat:
        return
    rows = gather_in_rank_order(torch.cat(flat), case.context.process_group)
    spread = (rows.max(0).values - rows.min(0).values).split([len(part) for part in flat])
    apart = {name: float(part.max()) for name, part in zip(stats, spread, strict=True) if part.any()}
    if apart:
        worst = max(apart, key=lambda name: apart[name])
        yield Trouble(
            tuple(apart),
            f"{len(apart)} layers differ between {len(rows)} processes, {worst} by up to {apart[worst]:.2g}",
            "from bnfinetune.bn.statistics.ranks import merge_running_stats; merge_running_stats(model, count=images)",
        )


@rule(
    "BN402",
    "two forwards before one backward under DDP",
    "warning",
    why="DDP overwrites BN buffers at the second forward while the backward of the first still holds them.",
    needs=("trace",),
)
def forwards_under_ddp(case: Case) -> Iterator[Trouble]:
    """**Symptom.** "One of the variables needed for gradient computation has been modified by an inplace operation".

    **Cause.** At each wrapped forward DDP broadcasts rank 0's buffers in place. A forward whose backward is still to
    come holds these buffers.

    **Found by.** Two training forwards without a backward between them, of a model in DDP that broadcasts buffers, with
    ordinary BN layers that update.

    ```python
    loss = criterion(ddp(a)) + criterion(ddp(b))                      # the pitfall

    loss = criterion(ddp(torch.cat([a, b])))                          # repaired: one forward
    bnf.apply_policy(ddp, bnf.BNPolicy(update_stats="ema"))           # or: layers that keep copies for backward
    ```
    """
    assert isinstance(case.trace, Trace)
    wrappers = [m for m in case.model.modules() if isinstance(m, DistributedDataParallel) and m.broadcast_buffers]
    native = [name for name, calls in case.trace.layers.items() if calls.updating and case.is_native(name)]
    if wrappers and native and case.trace.unanswered > 1:
        yield Trouble(
            tuple(native),
            f"{case.trace.unanswered} forwards of the wrapped model came before a backward",
            case.policy(native, 'update_stats="ema"'),
        )


@rule(
    "BN404",
    "SyncBatchNorm outside the GPUs",
    "warning",
    why="SyncBatchNorm refuses CPU tensors once processes train together, and exporters do not know it.",
)
def sync_on_cpu(case: Case) -> Iterator[Trouble]:
    """**Symptom.** "SyncBatchNorm expected input tensor to be on GPU", or DDP refuses the model.

    **Cause.** The layers were converted for training and never back.

    **Found by.** `nn.SyncBatchNorm` layers whose tensors are on the CPU, once processes talk by a backend for CPUs
    (gloo, MPI). Before that they may yet move: converting first and `model.to("cuda")` after is the common order.

    ```python
    model = timm.layers.convert_sync_batchnorm(model)                     # the pitfall on a CPU

    bnf.apply_policy(model, bnf.BNPolicy(train_stats="sync"))             # repaired: synchronised on any device
    ```
    """
    stuck = [
        name
        for name, layer in case.layers.items()
        if isinstance(layer, nn.SyncBatchNorm)
        and _talks_on_cpu(layer.process_group)
        and any(t.device.type == "cpu" for t in (*layer.parameters(), *layer.buffers()))
    ]
    if stuck:
        yield Trouble(
            tuple(stuck),
            f"{len(stuck)} SyncBatchNorm layers are on the CPU",
            case.policy(stuck, 'train_stats="sync"'),
            "bn.train_stats=sync",
        )


def _talks_on_cpu(group: Any) -> bool:
    """Whether the processes of a group have met, with nothing but CPUs to exchange tensors of."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_backend(group) in (dist.Backend.GLOO, dist.Backend.MPI)


@rule(
    "BN405",
    "processes synchronise a different number of times",
    "error",
    why="Each synchronised BN call waits for all processes; one that makes fewer leaves the others waiting for ever.",
    needs=("process_group",),
    rewatched=True,
)
def uneven_ranks(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Training hangs, at the end of an epoch or at a rare kind of image.

    **Cause.** Loaders of unequal length, branches that skip a layer on one process, empty inputs.

    **Found by.** With `process_group` and layers that synchronise: the batches of each process's loader, and after
    watched steps the calls of these layers. A collective: every process makes this call.

    ```python
    loader = DataLoader(images[rank::ranks], batch_size=8)                        # the pitfall: lengths may differ

    loader = DataLoader(images, batch_size=8, sampler=DistributedSampler(images)) # repaired: equal lengths
    ```
    """
    waiting = [name for name, known in case.switches.items() if known.train_stats == "sync"]
    counts = {"batches": _length(case.loader)}
    if case.trace is not None:
        counts = {"calls": sum(case.trace.layers[name].normalised for name in waiting)}
    ((what, mine),) = counts.items()
    numbers = gather_in_rank_order(torch.tensor([mine, len(waiting)]), case.context.process_group)
    if numbers[:, 1].any() and (numbers[:, 0] != numbers[0, 0]).any():
        yield Trouble(
            tuple(waiting),
            f"{what} per process: {', '.join(map(str, numbers[:, 0].tolist()))}",
            "loader = torch.utils.data.DataLoader(loader.dataset, batch_size=loader.batch_size, "
            "sampler=torch.utils.data.DistributedSampler(loader.dataset))",
        )


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:
        return -1


@rule(
    "BN406",
    "synchronisation across machines",
    "warning",
    why="Every BN layer waits twice per step for the network between machines, which it could do without.",
)
def sync_across_nodes(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Training on two machines is slower than on one.

    **Cause.** SyncBN over all processes exchanges statistics in every layer, forward and backward.

    **Found by.** More processes than one machine holds, and layers that synchronise over all of them, where the
    machine's own processes join 32 images or more.

    ```python
    bnf.apply_policy(model, bnf.BNPolicy(train_stats="sync"))                       # the pitfall on 2 x 8 GPUs

    bnf.apply_policy(model, bnf.BNPolicy(train_stats="sync", sync_group_size=8))    # repaired: within machines
    ```
    """
    local = case.ranks_per_node
    enough = case.batch_size is None or case.batch_size * local >= 32
    if case.ranks <= local or not enough:
        return
    wide = [n for n, known in case.switches.items() if known.train_stats == "sync" and case.sync_ranks(n) > local]
    if wide:
        yield Trouble(
            tuple(wide),
            f"{len(wide)} layers synchronise {case.ranks} processes on {-(-case.ranks // local)} machines",
            case.policy(wide, 'train_stats="sync"', f"sync_group_size={local}"),
            f"bn.train_stats=sync bn.sync_group_size={local}",
        )


@rule(
    "BN407",
    "running statistics in half precision",
    "error",
    why="An update of 10 % of a small difference is rounded away, and variances below 6e-8 become 0 in float16.",
)
def coarse_buffers(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Dtype errors under sharding, or statistics that stop moving.

    **Cause.** `model.half()`, or mixed precision of sharded training with half-precision buffers, converts BN too.

    **Found by.** Running statistics in float16 or bfloat16.

    ```python
    model.half()                                                        # the pitfall

    for layer in bnf.find_bn_layers(model).values(): layer.float()      # repaired
    ```
    """
    coarse: dict[str, Tensor] = {
        name: layer.running_var
        for name, layer in case.layers.items()
        if layer.running_var is not None and layer.running_var.dtype in _HALVES
    }
    if coarse:
        dtype = str(next(iter(coarse.values())).dtype).removeprefix("torch.")
        yield Trouble(
            tuple(coarse),
            f"{len(coarse)} layers keep their statistics in {dtype}",
            "for layer in bnf.find_bn_layers(model).values(): layer.float()",
            "train.mixed_precision=bf16",
        )
