"""The few collectives that statistics need: gathers in rank order, and faults that every rank hears of.

Every rank adds up the gathered parts by itself in the same order, so all ranks end with the same bits. A sum inside
the backend would leave the order, and with it the last bits, to the backend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bnfinetune.errors import StatisticsError

ProcessGroup = dist.ProcessGroup | None
T = TypeVar("T")


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


def share(action: Callable[[], Sequence[float]], width: int, group: ProcessGroup = None) -> list[list[float]]:
    """Runs an action on every rank and tells every rank what each of them got; a fault on one is raised on all.

    Args:
        action: what this rank does; gives `width` numbers. It must not run collectives itself.
        width: how many numbers.
        group: the process group; the default group if None.

    Returns:
        The numbers of rank 0, of rank 1, and so on.

    Raises:
        BaseException: on a rank whose own action failed: what it raised.
        StatisticsError: on the other ranks, naming the first that failed.
    """
    fault: BaseException | None = None
    numbers: Sequence[float] = [0.0] * width
    try:
        numbers = action()
    except BaseException as error:  # an interrupt too: the other ranks would wait for this one for ever
        fault = error
    if is_distributed(group):
        mine = torch.tensor([fault is not None, *numbers], dtype=torch.float64, device="cpu")
        rows = gather_in_rank_order(mine, group)
        if rows[:, 0].any():
            _raise_together(fault, rows[:, 0], group)
        return rows[:, 1:].tolist()
    if fault is not None:
        raise fault
    return [list(numbers)]


def together(action: Callable[[], T], group: ProcessGroup = None) -> T:
    """Runs an action on every rank; a fault on one is raised on all.

    Args:
        action: what this rank does. It must not run collectives itself.
        group: the process group; the default group if None.

    Returns:
        What this rank's action gave.

    Raises:
        BaseException: on a rank whose own action failed: what it raised.
        StatisticsError: on the other ranks, naming the first that failed.
    """
    results: list[T] = []

    def run() -> Sequence[float]:
        results.append(action())
        return ()

    share(run, 0, group)
    return results[0]


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
    differs = (rows != rows[0]).any(1)
    if differs.any():
        raise StatisticsError(
            f"rank {int(differs.int().argmax())} has other BN layers than rank 0 ({len(channels)} on this rank); "
            "give every rank the same model and the same selection"
        )


def _raise_together(fault: BaseException | None, faulty: Tensor, group: ProcessGroup) -> NoReturn:
    messages = [""] * len(faulty)
    dist.all_gather_object(messages, f"{type(fault).__name__}: {fault}", group=group)
    if fault is not None:
        raise fault
    rank = int(faulty.argmax())
    raise StatisticsError(f"rank {rank} failed with {messages[rank]}; no rank's statistics were changed")


def _device_of(group: ProcessGroup) -> torch.device:
    # "nccl" moves CUDA tensors only; "gloo" and "cpu:gloo,cuda:nccl" take tensors on the CPU.
    backend = str(dist.get_backend(group))
    if "gloo" in backend or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
