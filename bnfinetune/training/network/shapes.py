"""How a network takes images, and how much of a batch BN layers normalise: one value alone has no variance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.bn.statistics.precise import evaluation_mode
from bnfinetune.errors import DataError, SelectionError

_BLANK = 2  # images
_WORTHWHILE_SIDE = 96  # pixels from which channels_last saves time on a CPU


def input_format(model: nn.Module) -> torch.memory_format:
    """The memory format that a model's convolution weights are stored in."""
    for parameter in model.parameters():
        if parameter.ndim == 4 and not parameter.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def set_format(
    model: nn.Module, channels_last: bool | Literal["auto"], input_size: Sequence[int], device: torch.device
) -> None:
    """Store convolution weights in the memory format that a network is to compute in.

    Args:
        model: The network, changed in place; its values stay.
        channels_last: As the recipe says; `auto` is true where `python -m tests.bench memory_format` found it faster.
        input_size: Channels, height and width of one image.
        device: Where it will compute.
    """
    if channels_last == "auto":
        channels_last = device.type == "cpu" and min(input_size[1:]) >= _WORTHWHILE_SIDE
    if channels_last:
        model.to(memory_format=torch.channels_last)


def normalised_shapes(
    model: nn.Module, layers: Mapping[str, nn.Module], input_size: Sequence[int]
) -> dict[str, list[torch.Size]]:
    """Shapes of all that BN layers get in one observed forward of two blank images in evaluation mode.

    Args:
        model: The network with its policies applied.
        layers: BN layers of it by name.
        input_size: Channels, height and width of one image.
    """
    seen: dict[str, list[torch.Size]] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(args[0].shape)

        return layers[name].register_forward_pre_hook(note)

    handles = [watch(name) for name in layers]
    try:
        parameter = next(model.parameters())
        blank = torch.zeros(_BLANK, *input_size, device=parameter.device, dtype=parameter.dtype)
        with evaluation_mode(model), torch.no_grad():
            model(blank.contiguous(memory_format=input_format(model)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def normalised_values(model: nn.Module, input_size: Sequence[int]) -> float:
    """How many values of one image a BN layer normalises, on average over the model's layers and their calls."""
    shapes = [shape for each in normalised_shapes(model, find_bn_layers(model), input_size).values() for shape in each]
    return sum(shape.numel() for shape in shapes) / (_BLANK * max(len(shapes), 1))


def smallest_normalisation(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[str, int] | None:
    """The BN layer that sees the fewest values per channel and image in training, and how many these are.

    Only layers that normalise by the batch count.

    Args:
        model: The network with its policies applied.
        input_size: Channels, height and width of one image.

    Returns:
        The layer's name and its values per channel and image, or None if no layer normalises by the batch.
    """
    try:
        layers = find_bn_layers(model)
    except SelectionError:
        return None
    by_batch = {name: layer for name, layer in layers.items() if switches_of(layer).train_stats != "running"}
    if not by_batch:
        return None
    found = {
        name: min(shape.numel() // (shape[1] * _BLANK) for shape in shapes)
        for name, shapes in normalised_shapes(model, by_batch, input_size).items()
    }
    return min(found.items(), key=lambda item: item[1], default=None)


def smallest_batch(
    model: nn.Module, input_size: tuple[int, int, int], batch_size: int, rarest_share: float = 1.0
) -> int:
    """Fewest images of a batch that every training BN layer accepts: 1, or 2 where a layer sees one value per image.

    Where images of several domains are normalised apart, it is as many as give the rarest domain so many of them;
    domains are spread evenly over the batches, give or take one image.

    Raises:
        DataError: `batch_size` itself is below that.
    """
    found = smallest_normalisation(model, input_size)
    needed = 1 if found is None or found[1] > 1 else 2
    if needed > 1 and rarest_share < 1.0:
        needed = math.ceil((needed + 1) / rarest_share)
    if found is not None and batch_size < needed:
        raise DataError(
            f"train.batch_size={batch_size} leaves BN layer {found[0]} one value per channel, which has no variance; "
            f"use at least {needed}, a larger data.image_size, or frozen statistics (recipe=freeze_bn)"
        )
    return needed
