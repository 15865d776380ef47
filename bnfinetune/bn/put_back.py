"""What a block of code may change in a model and must not leave changed: the modes of its modules, its buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def modes_put_back(model: nn.Module) -> Iterator[None]:
    """After the block, every module is in the mode it was in before.

    Flags are set directly: a module's own `train` or `eval` may do more than that, and could not be undone.
    """
    # a frozen scripted module has no such flag
    modes = {module: module.training for module in model.modules() if hasattr(module, "training")}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def kept_buffers(model: nn.Module) -> Callable[[], None]:
    """Copies of a model's buffers; the function returned puts the buffers themselves back, with these values."""
    kept = [
        (module, key, b, b.clone()) for module in model.modules() for key, b in module._buffers.items() if b is not None
    ]

    def put_back() -> None:
        for module, key, buffer, value in kept:
            module._buffers[key] = buffer
            if not buffer.is_meta and not torch.equal(buffer, value):
                buffer.copy_(value)

    return put_back
