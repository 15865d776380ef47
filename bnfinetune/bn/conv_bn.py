"""A convolution and a BN layer of fixed statistics as one convolution: the arithmetic.

    y = conv(x, W * s) + (b + (c - m) * s),    s = g / sqrt(v + e)

W and c are the conv's weight and bias, g and b the BN layer's, m and v its statistics (You et al. 2024, "Tune Mode
ConvBN Blocks"). Gradients reach W, c, g and b; nothing of activation size is added to what the conv alone keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bnfinetune.bn.layers import native_class
from bnfinetune.bn.recorder import affine_of, population_of
from bnfinetune.errors import LayerError

CONVOLUTIONS = (_ConvNd, nn.Linear)
"""What can take a BN layer in: on a batch (N, C), `nn.Linear` is a convolution of kernel size 1."""

_CACHED = 2**16  # numbers
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

    @property
    def bias(self) -> Tensor:
        scaled = self.offset * self.scale
        return scaled if self.shift is None else self.shift + scaled


class _FoldParameters(torch.autograd.Function):
    """Folded weight and bias, with half as many small kernels as autograd would run."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, offset: Tensor, rstd: Tensor, gain: Tensor | None, shift: Tensor | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        terms = _Terms(offset, rstd, gain, shift)
        return weight * terms.scale.view(shape), terms.bias

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

    Where a layer has fewer outputs than weights, as late in a network or with few images, s multiplies the outputs
    instead of the weights, and in backward their gradient: the same function for less memory traffic. If g trains,
    these few outputs are kept, from before s; they are fewer than the weights.
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
        scale, bias, convolution = terms.scale, terms.bias, torch.ops.aten.convolution
        ctx.options = options
        ctx.by_output = options.positions(x, weight) <= weight[0].numel()
        if not ctx.by_output:
            ctx.save_for_backward(x, weight, offset, rstd, gain, None)
            return cast(Tensor, convolution(x, _times(weight, scale).to(x.dtype), bias.to(x.dtype), *options))
        z = convolution(x, weight.to(x.dtype), None, *options)
        kept = ctx.needs_input_grad[4]
        ctx.save_for_backward(x, weight, offset, rstd, gain, z if kept else None)
        return torch.addcmul(_columns(bias, z), z, _columns(scale, z), out=torch.empty_like(z) if kept else z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offset, rstd, gain, z = ctx.saved_tensors
        terms = _Terms(offset, rstd, gain, None)
        step = _backward_by_output if ctx.by_output else _backward_by_weight
        return *step(grad, x, weight, z, terms, ctx.options, ctx.needs_input_grad[:6]), None


def _backward_by_output(
    grad: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, terms: _Terms, options: _Options, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, offset, rstd (None), gain and shift; z (N, O, ...) is `conv(x, W)`."""
    for_x, for_weight, for_offset, _, for_gain, for_shift = needed
    wide = terms.rstd.dtype
    to_x = to_weight = to_offset = to_gain = to_shift = None
    if for_x or for_weight:
        scaled = grad * _columns(terms.scale, grad).to(grad.dtype)
        to_x, to_weight, _ = options.backward(scaled, x, weight, (for_x, for_weight, False))
    if for_offset or for_gain or for_shift:
        to_shift = _channel_sums(grad, wide)
    if for_offset:
        to_offset = cast(Tensor, to_shift) * terms.scale
    if for_gain:
        if torch.is_grad_enabled():  # what was kept knows nothing of x and W
            z = torch.ops.aten.convolution(x, weight.to(x.dtype), None, *options)
        to_gain = terms.rstd * torch.addcmul(
            _channel_sums(grad * cast(Tensor, z), wide), cast(Tensor, to_shift), terms.offset
        )
    return to_x, _in(to_weight, weight.dtype), to_offset, None, to_gain, to_shift if for_shift else None


def _backward_by_weight(
    grad: Tensor, x: Tensor, weight: Tensor, _: None, terms: _Terms, options: _Options, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """As `_backward_by_output`, from the gradients of the folded weight and bias."""
    for_x, for_weight, for_offset, _for_rstd, for_gain, for_shift = needed
    wide = terms.rstd.dtype
    mask = (for_x, for_weight or for_gain, for_offset or for_gain or for_shift)
    to_x, grad_weight, grad_bias = options.backward(grad, x, _times(weight, terms.scale), mask)
    grad_weight, grad_bias = _in(grad_weight, wide), _in(grad_bias, wide)
    to_weight = to_offset = to_gain = None
    if for_gain:
        to_scale = _row_products(cast(Tensor, grad_weight), weight.to(wide))
        to_gain = terms.rstd * torch.addcmul(to_scale, cast(Tensor, grad_bias), terms.offset)
    if for_offset:
        to_offset = cast(Tensor, grad_bias) * terms.scale
    if for_weight:
        # what has just been computed may be overwritten, unless backward is itself recorded
        times = _times if torch.is_grad_enabled() else _times_in_place
        to_weight = times(cast(Tensor, grad_weight), terms.scale).to(weight.dtype)
    return to_x, to_weight, to_offset, None, to_gain, grad_bias if for_shift else None


def _in(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _channel_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (C,) of a batch (N, C, ...)."""
    return x.sum([dim for dim in range(x.ndim) if dim != 1], dtype=dtype)


class _Options(NamedTuple):
    """What a convolution does with its weight, in the order of `aten::convolution`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def positions(self, x: Tensor, weight: Tensor) -> int:
        """Outputs per channel, over the whole batch."""
        sizes = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return len(x) * math.prod((size + 2 * pad - gap * (k - 1) - 1) // step + 1 for size, k, step, pad, gap in sizes)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias, as far as the mask asks for them."""
        biases = [weight.shape[0]]
        found = torch.ops.aten.convolution_backward(grad, x, weight.to(x.dtype), biases, *self, mask)
        return cast(tuple[Tensor | None, ...], found)


def _times(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale.view(-1, *[1] * (weight.ndim - 1))


def _times_in_place(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.mul_(scale.view(-1, *[1] * (weight.ndim - 1)))


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """Values (C,) as they multiply a batch (N, C, ...)."""
    return values.view(-1, *[1] * (like.ndim - 2))


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """The scalar products of the rows of two tensors (O, ...), on a CPU by parts that its cache holds."""
    order = sorted(range(1, a.ndim), key=a.stride, reverse=True)  # the order in memory: the rows are then views
    a, b = (tensor.permute(0, *order).flatten(1) for tensor in (a, b))
    rows = max(1, _CACHED // a.shape[1]) if a.device.type == "cpu" else len(a)
    return torch.cat([(x * y).sum(1) for x, y in zip(a.split(rows), b.split(rows), strict=True)])


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


def widest_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a device computes most exactly in."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


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
    options = _Options(conv.stride, conv.padding, conv.dilation, False, (0,) * (weight.ndim - 2), conv.groups)
    return cast(Tensor, _ConvBN.apply(x, weight, *terms, options))
