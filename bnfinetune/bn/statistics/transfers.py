"""Copies between devices, all of a kind in one: each would wait for what the accelerator has yet to compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_Kind = tuple[torch.device, torch.dtype]


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Float64 copies on the CPU, by one copy for each device and dtype; not every device has float64 itself."""
    copies: list[Tensor] = list(tensors)
    for indices in _by_kind([(tensor.device, tensor.dtype) for tensor in tensors]):
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices]).cpu().to(torch.float64)
        for i, part in zip(indices, flat.split([tensors[i].numel() for i in indices]), strict=True):
            copies[i] = part.view(tensors[i].shape)
    return copies


def store(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Writes values that are on the CPU into buffers of the same sizes, by one copy for each device and dtype.

    All buffers change in one call, which Python signals cannot interrupt half-way.
    """
    sent: list[Tensor] = list(values)
    for indices in _by_kind([(buffer.device, buffer.dtype) for buffer in buffers]):
        device, dtype = buffers[indices[0]].device, buffers[indices[0]].dtype
        flat = torch.cat([values[i].reshape(-1).to(dtype) for i in indices]).to(device)
        for i, part in zip(indices, flat.split([values[i].numel() for i in indices]), strict=True):
            sent[i] = part.view(buffers[i].shape)
    if buffers:
        torch._foreach_copy_(list(buffers), sent)


def _by_kind(kinds: Sequence[_Kind]) -> list[list[int]]:
    """Positions of what is of one kind, kind by kind."""
    found: dict[_Kind, list[int]] = {}
    for i, kind in enumerate(kinds):
        found.setdefault(kind, []).append(i)
    return list(found.values())
