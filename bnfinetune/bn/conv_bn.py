"""A convolution and a BN layer of fixed statistics as one convolution: the arithmetic.

    y = conv(x, W * s) + (b + (c - m) * s),    s = g / sqrt(v + e)

W and c are the conv's weight and bias, g and b the BN layer's, m and v its statistics (You et al. 2024, "Tune Mode
ConvBN Blocks"). Gradients reach W, c, g and b; nothing of activation size is added to what the conv alone keeps.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bnfinetune.bn.layers import native_class
from bnfinetune.bn.recorder import affine_of, population_of
from bnfinetune.errors import LayerError

CONVOLUTIONS = (_ConvNd, nn.Linear)
"""What can take a BN layer in: on a batch (N, C), `nn.Linear` is a convolution of kernel size 1."""

_PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_PLAIN_STEPS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)


class _Terms(NamedTuple):
    """What a BN layer contributes, each (O,): `c - m`, `1 / sqrt(v + e)`, g and b."""

    offset: Tensor
    rstd: Tensor
    gain: Tensor | None
    shift: Tensor | None

    @property
    def scale(self) -> Tensor:
        return self.rstd if self.gain is None else self.gain * self.rstd


def _folded(weight: Tensor, terms: _Terms, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    scale = terms.scale
    bias = terms.offset * scale if terms.shift is None else torch.addcmul(terms.shift, terms.offset, scale)
    return weight * scale.view(shape), bias


def _gradients(
    grad_weight: Tensor | None, grad_bias: Tensor | None, weight: Tensor, terms: _Terms, shape: Any, needed: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, offset, rstd (None), gain and shift from those of the folded weight and bias."""
    for_weight, for_offset, _, for_gain, for_shift = needed
    to_weight = to_offset = to_gain = None
    if for_weight:
        to_weight = cast(Tensor, grad_weight) * terms.scale.view(shape)
    if for_offset:
        to_offset = cast(Tensor, grad_bias) * terms.scale
    if for_gain:
        dims = [dim for dim, size in enumerate(shape) if size == 1]
        to_scale = (cast(Tensor, grad_weight) * weight).sum(dims)
        to_gain = terms.rstd * torch.addcmul(to_scale, cast(Tensor, grad_bias), terms.offset)
    return to_weight, to_offset, None, to_gain, grad_bias if for_shift else None


class _FoldParameters(torch.autograd.Function):
    """Folded weight and bias, with half as many small kernels as autograd would run."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, offset: Tensor, rstd: Tensor, gain: Tensor | None, shift: Tensor | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        return _folded(weight, _Terms(offset, rstd, gain, shift), shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, _, ctx.shape = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        weight, offset, rstd, gain = ctx.saved_tensors
        terms = _Terms(offset, rstd, gain, None)
        return *_gradients(grad_weight, grad_bias, weight, terms, ctx.shape, ctx.needs_input_grad[:5]), None


class _ConvBN(torch.autograd.Function):
    """The convolution with folded parameters, which are computed again in backward instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offset: Tensor,
        rstd: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        shape: tuple[int, ...],
        options: tuple[Any, ...],
    ) -> Tensor:
        folded, bias = _folded(weight.to(rstd.dtype), _Terms(offset, rstd, gain, shift), shape)
        ctx.save_for_backward(x, weight, offset, rstd, gain)
        ctx.shape, ctx.options = shape, options
        return cast(Tensor, torch.ops.aten.convolution(x, folded.to(x.dtype), bias.to(x.dtype), *options))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offset, rstd, gain = ctx.saved_tensors
        terms, wide = _Terms(offset, rstd, gain, None), weight.to(rstd.dtype)
        for_x, *needed = ctx.needs_input_grad[:6]
        for_weight, for_offset, _, for_gain, for_shift = needed
        mask = [for_x, for_weight or for_gain, for_offset or for_gain or for_shift]
        folded = (wide * terms.scale.view(ctx.shape)).to(x.dtype)
        to_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, folded, [weight.shape[0]], *ctx.options, mask
        )
        grad_weight, grad_bias = (None if g is None else g.to(wide.dtype) for g in (grad_weight, grad_bias))
        to_weight, *others = _gradients(grad_weight, grad_bias, wide, terms, ctx.shape, needed)
        return to_x, None if to_weight is None else to_weight.to(weight.dtype), *others, None, None


def channel_axis(conv: nn.Module) -> int:
    """The axis of a conv's weight that runs over output channels."""
    return 1 if isinstance(conv, _ConvTransposeNd) else 0


def _shape(conv: nn.Module, weight: Tensor) -> tuple[int, ...]:
    axis = channel_axis(conv)
    return tuple(-1 if dim == axis else 1 for dim in range(weight.ndim))


def _terms(conv: nn.Module, bn: nn.Module, wide: torch.dtype) -> _Terms:
    stats = population_of(bn)
    if stats is None:
        raise LayerError(f"a folded {native_class(bn).__name__} has lost its running statistics; set them again")
    bias, mean = cast(Tensor | None, conv.bias), stats.mean.to(wide)
    gain, shift = (None if tensor is None else tensor.to(wide) for tensor in affine_of(bn))
    # Offset and rstd are new tensors: DDP overwrites buffers at the next forward, which may precede this backward.
    rstd = (stats.var.to(wide) + cast(float, bn.eps)).rsqrt()
    return _Terms(-mean if bias is None else bias.to(wide) - mean, rstd, gain, shift)


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
    weight = cast(Tensor, conv.weight)
    wide = wide or torch.promote_types(weight.dtype, torch.float32)
    folded, bias = _FoldParameters.apply(weight.to(wide), *_terms(conv, bn, wide), _shape(conv, weight))
    return folded.to(weight.dtype), bias.to(weight.dtype)


def is_plain(conv: nn.Module) -> bool:
    """Whether a conv does just what `torch.ops.aten.convolution` does, padding with zeros."""
    cls: Any = native_class(conv)
    return (
        getattr(cls, "forward", None) in _PLAIN
        and getattr(cls, "_conv_forward", None) in _PLAIN_STEPS
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def conv_bn(conv: Any, bn: nn.Module, x: Tensor) -> Tensor:
    """What a plain conv and a BN layer of fixed statistics compute, the folded parameters not kept for backward.

    Args:
        conv: a conv that `is_plain`.
        bn: a BN layer of its O output channels.
        x: (N, I, ...).

    Returns:
        (N, O, ...), under autocast in its dtype.
    """
    weight = conv.weight
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(device))
    terms = _terms(conv, bn, torch.promote_types(weight.dtype, torch.float32))
    options = conv.stride, conv.padding, conv.dilation, False, (0,) * (weight.ndim - 2), conv.groups
    return cast(Tensor, _ConvBN.apply(x, weight, *terms, _shape(conv, weight), options))
