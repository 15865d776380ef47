"""What a BN layer computes, found by running its class's forward on a stand-in whose statistics are known.

The stand-in has the layer's attributes and, on the CPU in float64, tensors of the layer's shapes. The layer itself is
not run, nor are its hooks; no random state is changed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RANKS = (4, 2, 3, 5)  # of an input: most layers take images
LEAST_EPS = 1e-30
"""Drowned by any variance of activations and by any other eps, while its root is still a float32."""
_TOLERANCE = 1e-6  # some forwards compute in float32 whatever they are given


def eps_by_trial(native: Any, layer: nn.Module) -> float | None:
    """The eps in a forward that gives `(x - m) / sqrt(v + eps)` where that is large; None if it cannot be told.

    With mean 0, almost no variance, weight 1 and bias 0, an input of 1 becomes `1 / sqrt(eps)`. Where a forward adds
    nothing it is 1e-30, which changes no float32 variance, since batch normalisation refuses 0.

    Args:
        native: the layer's class without any policy.
        layer: a layer that has running statistics.
    """
    channels = _channels(layer)
    zero, one = torch.zeros(channels, **_wide()), torch.ones(channels, **_wide())
    values = {"running_mean": zero, "running_var": zero + LEAST_EPS, "weight": one, "bias": zero}
    with _undisturbed():
        for rank in _RANKS:
            try:
                y = native.forward(
                    _stand_in(native, layer, values), torch.ones(2, channels, *[2] * (rank - 2), **_wide())
                )
            except Exception:
                continue
            if isinstance(y, Tensor) and y.numel() and (y == y.flatten()[0]).all():
                eps = float(y.flatten()[0].detach().double() ** -2) - LEAST_EPS
                if math.isfinite(eps):
                    return float(f"{eps:.12g}") if eps > math.sqrt(LEAST_EPS) else LEAST_EPS
    return None


def computes(
    native: Any, layer: nn.Module, tail: Callable[[nn.Module, Tensor], Tensor], eps: float, *, frozen: bool
) -> bool:
    """Whether a layer's forward is that of BN in either mode, followed by a tail.

    Args:
        native: the layer's class without any policy.
        layer: a layer that has running statistics.
        tail: called as `tail(layer, normalised)`.
        eps: the eps to compare with.
        frozen: whether training must give what evaluation gives, and leave every buffer alone.
    """
    channels = _channels(layer)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, **_wide())

    values = {
        "running_mean": draw(channels) * 2 - 1,
        "running_var": 10 ** (draw(channels) * 7 - 6),  # small ones, to see where eps is added
        "weight": draw(channels) + 0.5,
        "bias": draw(channels) * 2 - 1,
    }
    with _undisturbed():
        for rank in _RANKS:
            x = draw(4, channels, *[3] * (rank - 2)) * 4 - 2
            tries = [(training, learns) for training in (False, True) for learns in (False, True)]
            try:
                if all(_agrees(native, layer, values, tail, eps, frozen, x, *each) for each in tries):
                    return True
            except Exception:
                continue
    return False


def takes_images(native: Any, layer: nn.Module) -> bool:
    """Whether a layer's forward turns images (N, C, H, W) into such of the same shape.

    Args:
        native: the layer's class without any policy.
        layer: a layer that has running statistics.
    """
    images = torch.ones(2, _channels(layer), 3, 3, **_wide())
    with _undisturbed():
        try:
            return bool(native.forward(_stand_in(native, layer, {}), images).shape == images.shape)
        except Exception:  # a forward may refuse an input in any way
            return False


def _agrees(
    native: Any,
    layer: nn.Module,
    values: Mapping[str, Tensor],
    tail: Callable[[nn.Module, Tensor], Tensor],
    eps: float,
    frozen: bool,
    x: Tensor,
    training: bool,
    learns: bool,
) -> bool:
    stand_in = _stand_in(native, layer, values).train(training)
    before = {name: buffer.clone() for name, buffer in stand_in.named_buffers()}
    torch.manual_seed(0)
    got = native.forward(stand_in, x.clone().requires_grad_(learns))
    if frozen and any(not torch.equal(buffer, before[name]) for name, buffer in stand_in.named_buffers()):
        return False
    weight, bias = (values[key] if getattr(layer, key, None) is not None else None for key in ("weight", "bias"))
    mean, var = values["running_mean"].clone(), values["running_var"].clone()
    wanted = F.batch_norm(x, mean, var, weight, bias, training and not frozen, 0.0, eps)
    torch.manual_seed(0)
    wanted = tail(stand_in, wanted)
    if not isinstance(got, Tensor) or got.shape != wanted.shape:
        return False
    size = wanted.abs().transpose(0, 1).flatten(1).amax(1).view(-1, *[1] * (x.ndim - 2))
    return bool(((got - wanted).abs() <= _TOLERANCE * size).all())


def _stand_in(native: Any, layer: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    stand_in: nn.Module = native.__new__(native)
    vars(stand_in).update(vars(layer))
    vars(stand_in)["_buffers"] = {key: _like(old, values.get(key)) for key, old in layer._buffers.items()}
    vars(stand_in)["_parameters"] = {
        key: None if old is None else nn.Parameter(_like(old, values.get(key)), old.requires_grad)
        for key, old in layer._parameters.items()
    }
    vars(stand_in)["_modules"] = {
        key: None if child is None else copy.deepcopy(child).to("cpu", torch.float64)
        for key, child in layer._modules.items()
    }
    return stand_in.eval()


def _like(old: Any, value: Tensor | None) -> Any:
    if old is None:
        return None
    return (
        old.detach().to("cpu", torch.float64 if old.is_floating_point() else old.dtype) if value is None else value
    ).clone()


def _channels(layer: Any) -> int:
    return int(layer.running_mean.numel())


def _wide() -> dict[str, Any]:
    return {"device": "cpu", "dtype": torch.float64}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Neither touched by the caller's modes and random state nor touching them."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield
