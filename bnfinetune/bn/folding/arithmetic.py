"""A convolution and a BN layer of fixed statistics as one convolution: the arithmetic.

    y = conv(x, W * s) + (b + (c - m) * s),    s = g / sqrt(v + e)

W and c are the conv's weight and bias, g and b the BN layer's, m and v its statistics (You et al. 2024, "Tune Mode
ConvBN Blocks"). Gradients reach W, c, g and b by autograd, which keeps `W * s` for backward, and nothing of activation
size besides what the conv alone keeps.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bnfinetune.bn.folding.keeper import Keeper
from bnfinetune.bn.functional import along, normalise_by_fixed
from bnfinetune.bn.layers import eps_of, native_class
from bnfinetune.bn.population import population_of
from bnfinetune.errors import LayerError

CONVOLUTIONS = (_ConvNd, nn.Linear)
"""What can take a BN layer in: on a batch (N, C), `nn.Linear` is a convolution of kernel size 1."""

_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_STEPS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)


class PairParameters(NamedTuple):
    """What a conv and a BN layer of O channels may learn: W as the conv has it, and c, g and b, each (O,) or None."""

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    shift: Tensor | None

    @property
    def wide(self) -> torch.dtype:
        """The dtype to fold in: that of W, or float32 for half precision."""
        return torch.promote_types(self.weight.dtype, torch.float32)


def parameters_of(conv: nn.Module, bn: nn.Module) -> PairParameters:
    """The present parameters of a conv and of a BN layer behind it."""
    return PairParameters(cast(Tensor, conv.weight), cast(Tensor | None, conv.bias), *population_of(bn).affine)


class Normaliser(NamedTuple):
    """What a BN layer's fixed statistics say, each (O,): m and v, `-m` and `1 / sqrt(v + e)`."""

    mean: Tensor
    var: Tensor
    negative_mean: Tensor
    rstd: Tensor


def normaliser(bn: nn.Module, wide: torch.dtype) -> Normaliser:
    """What the running statistics of a BN layer's present domain say, computed in `wide`.

    All are new tensors: DDP overwrites buffers at the next forward, which may precede the backward of this one.

    Raises:
        LayerError: the layer has lost its statistics.
    """
    stats = population_of(bn).stats
    if stats is None:
        raise LayerError(f"a folded {native_class(bn).__name__} has lost its running statistics; set them again")
    mean, var = (tensor.to(wide, copy=True) for tensor in stats[:2])
    return Normaliser(mean, var, -mean, (var + eps_of(bn)).rsqrt())


def fold_with(parameters: PairParameters, fixed: Normaliser, axis: int) -> tuple[Tensor, Tensor]:
    """`W * s` and `b + (c - m) * s`, computed in the dtype of `fixed` and returned in that of W, differentiable.

    Args:
        parameters: W, c, g and b.
        fixed: m, v and what follows from them.
        axis: that of W which runs over output channels.
    """
    wide = fixed.rstd.dtype
    weight, bias, gain, shift = parameters
    scale = fixed.rstd if gain is None else _in(gain, wide) * fixed.rstd
    offset = fixed.negative_mean if bias is None else _in(bias, wide) + fixed.negative_mean
    folded = _in(weight, wide) * scale.view(along(axis, weight.ndim))
    moved = offset * scale if shift is None else torch.addcmul(_in(shift, wide), offset, scale)
    return _in(folded, weight.dtype), _in(moved, weight.dtype)


def fold_parameters(conv: nn.Module, bn: nn.Module, wide: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias with which a conv alone computes what it and a BN layer of fixed statistics do.

    Args:
        conv: a convolution with `weight` (O, I, ...) or, where transposed, (I, O, ...).
        bn: a BN layer of O channels, normalising with the running statistics of its present domain.
        wide: the dtype to compute in; by default that of W, or float32 for half precision.

    Returns:
        `W * s` in the shape of W, and `b + (c - m) * s` of shape (O,), both in the dtype of W and differentiable in
        W, c, g and b.
    """
    parameters = parameters_of(conv, bn)
    return fold_with(parameters, normaliser(bn, wide or parameters.wide), channel_axis(conv))


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, for less than what a call of `to` costs where it is in it already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def channel_axis(conv: nn.Module) -> int:
    """The axis of a conv's weight that runs over output channels."""
    return 1 if isinstance(conv, _ConvTransposeNd) else 0


def widest_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a device computes most exactly in."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def compute_as_one(
    conv: nn.Module, bn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], keeper: Keeper | None = None
) -> Tensor:
    """What a BN layer of fixed statistics makes of a conv's output, without its tail: (N, O, ...).

    Where the conv has fewer outputs than weights, as late in a network or with few images, the two layers run one after
    the other: that is less memory traffic, and what is kept, if g trains, are these few outputs.

    Args:
        conv: the conv.
        bn: the BN layer.
        args: what the conv gets, the first (N, I, ...).
        kwargs: its named arguments.
        keeper: keeps what can be kept for the next forward; None to compute all anew.
    """
    parameters = parameters_of(conv, bn)
    learned = [tensor for tensor in parameters if tensor is not None]
    if keeper is not None and not any(tensor.requires_grad for tensor in learned):
        folded = keeper.keep(conv, bn, learned, None, lambda: fold_parameters(conv, bn))
        return run_with(conv, *folded, *args, **kwargs)
    wide = parameters.wide
    fixed = normaliser(bn, wide) if keeper is None else keeper.keep(bn, bn, [], wide, lambda: normaliser(bn, wide))
    if has_fewer_outputs(conv, *args, *kwargs.values()):
        z = run_with(conv, parameters.weight, parameters.bias, *args, **kwargs)
        return normalise_outputs(z, parameters, fixed, eps_of(bn))
    return run_with(conv, *fold_with(parameters, fixed, channel_axis(conv)), *args, **kwargs)


def run_with(conv: nn.Module, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """Runs the forward of a conv's own class with another weight and bias, leaving the conv as it is."""
    native: Any = native_class(conv)
    if native.forward in _FORWARDS:
        return cast(Tensor, native._conv_forward(conv, *args, *kwargs.values(), weight, bias))
    stand_in = object.__new__(native)
    vars(stand_in).update({key: value for key, value in vars(conv).items() if key not in ("weight", "bias")})
    vars(stand_in)["_parameters"] = {**conv._parameters, "weight": weight, "bias": bias}
    return cast(Tensor, native.forward(stand_in, *args, **kwargs))


def has_fewer_outputs(conv: Any, x: Tensor) -> bool:
    """Whether a conv has at most as many outputs of a batch (N, I, ...) as weights; False if its class is unknown."""
    native: Any = native_class(conv)
    if not (native.forward in _FORWARDS and native._conv_forward in _STEPS) or isinstance(conv.padding, str):
        return False
    weights: torch.Size = conv.weight.shape
    positions = _positions(x.shape, weights[2:], conv.stride, conv.padding, conv.dilation)
    return positions <= math.prod(weights[1:])


@lru_cache(maxsize=4096)
def _positions(
    inputs: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> int:
    """Outputs per channel, over the whole batch."""
    sizes = zip(inputs[2:], kernel, stride, padding, dilation, strict=True)
    return inputs[0] * math.prod((size + 2 * pad - gap * (k - 1) - 1) // step + 1 for size, k, step, pad, gap in sizes)


def normalise_outputs(z: Tensor, parameters: PairParameters, fixed: Normaliser, eps: float) -> Tensor:
    """What a BN layer of fixed statistics makes of a conv's outputs (N, O, ...): the two one after the other."""
    gain, shift = (None if tensor is None else _in(tensor, fixed.mean.dtype) for tensor in parameters[2:])
    return normalise_by_fixed(z, fixed.mean, fixed.var, gain, shift, eps)
