"""Out of memory, in words that name the keys which help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from bnfinetune.errors import BnFinetuneError, TrainingError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that the device's or the host's memory is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


@contextmanager
def enough_memory(device: torch.device, setting: str, remedies: str) -> Iterator[None]:
    """Say of an allocation that fails in this context what asked for so much and what lowers it.

    Args:
        device: Where the network runs.
        setting: The key that matters most, with its value.
        remedies: Other ways.

    Raises:
        TrainingError: The memory was used up.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, BnFinetuneError) or not is_out_of_memory(error):
            raise
        where = "GPU memory" if isinstance(error, torch.OutOfMemoryError) and device.type == "cuda" else "memory"
        raise TrainingError(f"out of {where} with {setting}: {remedies}") from error
