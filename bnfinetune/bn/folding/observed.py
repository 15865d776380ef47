"""Forwards that only look: in either mode, on an example, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.put_back import kept_buffers, modes_put_back
from bnfinetune.errors import PolicyError, SelectionError

Example = Tensor | Sequence[Any] | Mapping[str, Any]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient, no compiled code; modes, buffers and random state are put back."""
    devices = sorted({t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"})
    trained = model.training
    put_back = kept_buffers(model)
    with (
        modes_put_back(model),
        torch.random.fork_rng(devices),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            model.eval()
            yield
        finally:
            # Some modules drop what they cached in evaluation when they are told to train, and only then.
            model.train(trained)
            put_back()


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """As `evaluating`, but in training mode, except for BN layers."""
    with evaluating(model):
        model.train()
        try:
            for layer in find_bn_layers(model).values():
                layer.training = False
        except SelectionError:
            pass
        yield


def example_arguments(model: nn.Module, example_input: Example | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments for a model's forward, of its device and dtype.

    Args:
        model: a bare model.
        example_input: as in `find_pairs`; None for zeros of timm's `pretrained_cfg["input_size"]`, one image.

    Raises:
        PolicyError: no example input and no `pretrained_cfg`.
    """
    floating = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    # Offloaded parameters stand on the meta device while nothing runs; buffers may tell where it will.
    like = next((tensor for tensor in floating if not tensor.is_meta), next(iter(floating), torch.zeros(())))
    if example_input is None:
        return (torch.zeros(1, *_input_size(model), device=like.device, dtype=like.dtype),), {}

    def fitted(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)

    if isinstance(example_input, Mapping):
        return (), {name: tree_map(fitted, value) for name, value in example_input.items()}
    args = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    return tree_map(fitted, args), {}


def _input_size(model: nn.Module) -> tuple[int, ...]:
    """Channels, height and width that a timm model takes; its first conv knows best how many channels.

    The exception is a stem that first moves blocks of 4x4 pixels into channels (TResNet's).
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    if size is None:
        raise PolicyError(
            f"{type(model).__name__} has no pretrained_cfg['input_size'] to make an input of; pass example_input"
        )
    first = config.get("first_conv")
    modules = dict(model.named_modules())
    channels = getattr(modules.get(first) if isinstance(first, str) else None, "in_channels", size[0])
    return (size[0] if channels == 16 * size[0] else channels, *size[1:])
