"""The few collectives that statistics need: gathers in rank order, and faults that every rank hears of.

Every rank adds up the gathered parts by itself in the same order, so all ranks end with the same bits. A sum inside
the backend would leave the order, and with it the last bits, to the backend.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from bnfinetune.errors import StatisticsError

ProcessGroup = dist.ProcessGroup | None


def is_distributed(group: ProcessGroup = None) -> bool:
    """Whether there is more than one rank to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def gather_in_rank_order(tensor: Tensor, group: ProcessGroup = None) -> Tensor:
    """Gathers equally shaped tensors of all ranks.

    Args:
        tensor: this rank's part, of the same shape (...) and dtype on every rank.
        group: the process group; the default group if None.

    Returns:
        A CPU tensor of shape (ranks, ...), part r from rank r. Without process group: the part alone, as (1, ...).
    """
    if not is_distributed(group):
        return tensor.cpu()[None]
    part = tensor.contiguous().to(_device_of(group))
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group=group)
    return torch.stack(parts).cpu()


def raise_on_all_ranks(fault: BaseException | None, group: ProcessGroup = None) -> None:
    """Lets every rank know of a fault on any: the faulty ranks raise their own, the others name the first of them.

    Args:
        fault: what went wrong on this rank, if anything did.
        group: the process group; the default group if None.

    Raises:
        BaseException: `fault` itself.
        StatisticsError: another rank has a fault.
    """
    if is_distributed(group):
        faulty = gather_in_rank_order(torch.tensor(fault is not None), group)
        if faulty.any():
            messages = [""] * len(faulty)
            dist.all_gather_object(messages, f"{type(fault).__name__}: {fault}", group=group)
            rank = int(faulty.int().argmax())
            if fault is None:
                raise StatisticsError(f"rank {rank} failed with {messages[rank]}; no rank's statistics were changed")
    if fault is not None:
        raise fault


def _device_of(group: ProcessGroup) -> torch.device:
    # "nccl" moves CUDA tensors only; "gloo" and "cpu:gloo,cuda:nccl" take tensors on the CPU.
    backend = str(dist.get_backend(group))
    if "gloo" in backend or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
