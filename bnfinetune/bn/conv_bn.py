"""A convolution and a BN layer of fixed statistics as one convolution: the arithmetic.

    y = conv(x, W * s) + (b + (c - m) * s),    s = g / sqrt(v + e)

W and c are the conv's weight and bias, g and b the BN layer's, m and v its statistics (You et al. 2024, "Tune Mode
ConvBN Blocks"). Gradients reach W, c, g and b; nothing of activation size is added to what the conv alone keeps,
but for convs with fewer outputs than weights (`conv_bn`).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bnfinetune.bn.layers import native_class
from bnfinetune.bn.normalise import along, normalise_by_fixed
from bnfinetune.bn.recorder import affine_of, population_of
from bnfinetune.errors import LayerError

CONVOLUTIONS = (_ConvNd, nn.Linear)
"""What can take a BN layer in: on a batch (N, C), `nn.Linear` is a convolution of kernel size 1."""

_PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_PLAIN_STEPS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)


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
    return PairParameters(cast(Tensor, conv.weight), cast(Tensor | None, conv.bias), *affine_of(bn))


class Normaliser(NamedTuple):
    """What a BN layer's fixed statistics say, each (O,): `-m` and `1 / sqrt(v + e)`, and m and v themselves."""

    negative_mean: Tensor
    rstd: Tensor
    mean: Tensor
    var: Tensor


class _Terms(NamedTuple):
    """What a BN layer contributes, each (O,): `c - m`, `1 / sqrt(v + e)`, g and b."""

    offset: Tensor
    rstd: Tensor
    gain: Tensor | None
    shift: Tensor | None

    @property
    def scale(self) -> Tensor:
        return self.rstd if self.gain is None else self.gain * self.rstd

    def bias(self, scale: Tensor) -> Tensor:
        return self.offset * scale if self.shift is None else torch.addcmul(self.shift, self.offset, scale)


class _FoldParameters(torch.autograd.Function):
    """Folded weight and bias, with half as many small kernels as autograd would run."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, offset: Tensor, rstd: Tensor, gain: Tensor | None, shift: Tensor | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        terms = _Terms(offset, rstd, gain, shift)
        scale = terms.scale
        return weight * scale.view(shape), terms.bias(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, _, ctx.shape = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        weight, offset, rstd, gain = ctx.saved_tensors
        for_weight, for_offset, _, for_gain, for_shift, _ = ctx.needs_input_grad
        scale = rstd if gain is None else gain * rstd
        to_gain = None
        if for_gain:
            dims = [dim for dim, size in enumerate(ctx.shape) if size == 1]
            to_gain = rstd * torch.addcmul((grad_weight * weight).sum(dims), grad_bias, offset)
        return (
            grad_weight * scale.view(ctx.shape) if for_weight else None,
            grad_bias * scale if for_offset else None,
            None,
            to_gain,
            grad_bias if for_shift else None,
            None,
        )


class _ConvBN(torch.autograd.Function):
    """The convolution with folded parameters, which are computed again in backward instead of being kept.

    Under autocast the folded weight is kept, in half precision: autocast would keep a copy of W in its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offset: Tensor,
        rstd: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        options: _Options,
    ) -> Tensor:
        terms = _Terms(offset, rstd, gain, shift)
        scale = terms.scale
        folded, bias = _times(weight, scale, x.dtype), _in(terms.bias(scale), x.dtype)
        ctx.options = options
        ctx.save_for_backward(x, weight, offset, rstd, gain, None if x.dtype == weight.dtype else folded)
        return torch.convolution(x, folded, bias, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offset, rstd, gain, folded = ctx.saved_tensors
        scale = _Terms(offset, rstd, gain, None).scale
        for_x, for_weight, for_offset, _, for_gain, for_shift, _ = ctx.needs_input_grad
        recorded = torch.is_grad_enabled()
        if folded is None or recorded:  # what was kept knows nothing of W and g
            folded = _times(weight, scale, x.dtype)
        to_x, to_folded = ctx.options.backward(grad, x, folded, (for_x, for_weight or for_gain))
        # A convolution's own backward takes longer for the gradient of a bias than this sum does.
        to_bias = _channel_sums(grad, rstd.dtype) if for_offset or for_gain or for_shift else None
        to_weight = to_gain = None
        if to_folded is not None:
            to_folded = _in(to_folded, rstd.dtype)
            if for_gain:
                to_scale = (to_folded * weight).sum(tuple(range(1, weight.ndim)))
                to_gain = rstd * torch.addcmul(to_scale, cast(Tensor, to_bias), offset)
            if for_weight:  # by now the gradient of the folded weight may be overwritten, unless this is recorded
                rows = scale.view(along(0, weight.ndim))
                to_weight = to_folded * rows if recorded else to_folded.mul_(rows)
        return (
            to_x,
            None if to_weight is None else _in(to_weight, weight.dtype),
            cast(Tensor, to_bias) * scale if for_offset else None,
            None,
            to_gain,
            to_bias if for_shift else None,
            None,
        )


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, for less than what a call of `to` costs where it is in it already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _channel_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (C,) of a batch (N, C, ...)."""
    return x.sum((0, *range(2, x.ndim)), dtype=dtype)


class _Options(NamedTuple):
    """What a convolution does with its weight, in the order of `aten::convolution`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def positions(self, inputs: tuple[int, ...], weights: tuple[int, ...]) -> int:
        """Outputs per channel, over the whole batch, of a batch (N, I, ...)."""
        sizes = zip(inputs[2:], weights[2:], self.stride, self.padding, self.dilation, strict=True)
        return inputs[0] * math.prod(
            (size + 2 * pad - gap * (k - 1) - 1) // step + 1 for size, k, step, pad, gap in sizes
        )

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
        """Gradients of input and weight, as far as the mask asks for them."""
        found = torch.ops.aten.convolution_backward(grad, x, weight, None, *self, (*mask, False))
        return cast(tuple[Tensor | None, ...], found[:2])


@lru_cache(maxsize=4096)
def _fewer_outputs(inputs: tuple[int, ...], weights: tuple[int, ...], options: _Options) -> bool:
    """Whether a convolution has at most as many outputs as weights."""
    return options.positions(inputs, weights) <= math.prod(weights[1:])


def _times(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`W * s` in another dtype, where autograd does not look on in one step."""
    rows = scale.view(along(0, weight.ndim))
    if weight.dtype == dtype == scale.dtype or torch.is_grad_enabled():
        return _in(weight * rows, dtype)
    return torch.mul(weight, rows, out=torch.empty_like(weight, dtype=dtype))


def channel_axis(conv: nn.Module) -> int:
    """The axis of a conv's weight that runs over output channels."""
    return 1 if isinstance(conv, _ConvTransposeNd) else 0


def normaliser(bn: nn.Module, wide: torch.dtype) -> Normaliser:
    """What the running statistics of a BN layer's present domain say, computed in `wide`.

    All are new tensors: DDP overwrites buffers at the next forward, which may precede the backward of this one.

    Raises:
        LayerError: the layer has lost its statistics.
    """
    stats = population_of(bn)
    if stats is None:
        raise LayerError(f"a folded {native_class(bn).__name__} has lost its running statistics; set them again")
    mean, var = (tensor.to(wide, copy=True) for tensor in stats[:2])
    return Normaliser(-mean, (var + cast(float, bn.eps)).rsqrt(), mean, var)


def _terms(parameters: PairParameters, fixed: Normaliser) -> _Terms:
    _, bias, gain, shift = parameters
    wide = fixed.rstd.dtype
    return _Terms(
        fixed.negative_mean if bias is None else _in(bias, wide) + fixed.negative_mean,
        fixed.rstd,
        None if gain is None else _in(gain, wide),
        None if shift is None else _in(shift, wide),
    )


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
    weight, wide = parameters.weight, wide or parameters.wide
    terms = _terms(parameters, normaliser(bn, wide))
    folded, bias = _FoldParameters.apply(weight.to(wide), *terms, along(channel_axis(conv), weight.ndim))
    return folded.to(weight.dtype), bias.to(weight.dtype)


def widest_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a device computes most exactly in."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


@lru_cache
def _computes_plainly(cls: Any) -> bool:
    return getattr(cls, "forward", None) in _PLAIN and getattr(cls, "_conv_forward", None) in _PLAIN_STEPS


def is_plain(conv: nn.Module) -> bool:
    """Whether a conv does just what `torch.convolution` does, padding with zeros."""
    cls: Any = native_class(conv)
    return _computes_plainly(cls) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def conv_bn(conv: Any, parameters: PairParameters, fixed: Normaliser, eps: float, x: Tensor) -> Tensor:
    """What a plain conv and a BN layer of fixed statistics compute, the folded parameters not kept for backward.

    Where the conv has fewer outputs than weights, as late in a network or with few images, the two run one after the
    other, as if they were not folded: that is less memory traffic, and if g trains, what is kept besides are these few
    outputs.

    Args:
        conv: a conv that `is_plain`.
        parameters: those of the conv and of a BN layer of its O output channels.
        fixed: the `normaliser` of that layer, in the `wide` dtype of the parameters.
        eps: that of the layer.
        x: (N, I, ...).

    Returns:
        (N, O, ...), under autocast in its dtype.
    """
    weight = parameters.weight
    options = _Options(conv.stride, conv.padding, conv.dilation, False, (0,) * (weight.ndim - 2), conv.groups)
    if _fewer_outputs(x.shape, weight.shape, options):
        gain, shift = (None if tensor is None else _in(tensor, fixed.mean.dtype) for tensor in parameters[2:])
        z = cast(Any, native_class(conv)).forward(conv, x)
        return normalise_by_fixed(z, fixed.mean, fixed.var, gain, shift, eps)
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(device))
    return cast(Tensor, _ConvBN.apply(x, weight, *_terms(parameters, fixed), options))
