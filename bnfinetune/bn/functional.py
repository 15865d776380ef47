"""Normalising with given statistics, and the moments of a batch: the differentiable steps that PyTorch has only fused.

Each function takes one fused pass over the batch forward and backward, keeps the batch's dtype and memory format, and
computes statistics in float32 or better. The fused steps know first derivatives only. Second derivatives, forward mode
and the transforms of `torch.func` take the same formulas written in plain operators, which PyTorch differentiates and
transforms by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def along(axis: int, ndim: int) -> tuple[int, ...]:
    """The shape in which values (C,) multiply a tensor of `ndim` dimensions whose channels run along an axis."""
    return tuple(-1 if dim == axis else 1 for dim in range(ndim))


def is_traced(x: Any) -> bool:
    """Whether `torch.fx` is tracing, and a batch only stands for a tensor."""
    return not isinstance(x, Tensor)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of a batch are computed: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The most exact floating dtype of a device: float64, but float32 on MPS and on those XPUs that have no other."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


def _needs_plain_operators() -> bool:
    """Whether a transform of `torch.func`, or forward mode, is at work: neither sees into a fused step of ours."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _needs_second_derivative() -> bool:
    """Whether the backward that runs now is to be differentiated itself (`create_graph=True`)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _plain_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[1], dtype=wide_dtype(x.dtype))
        return mean, mean.clone()
    dims = [0, *range(2, x.ndim)]
    if x.dtype != wide_dtype(x.dtype) and _has_wide_kernel(x):
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        var, mean = torch.var_mean(x.to(wide_dtype(x.dtype)), dims, correction=0)
    return mean, var


def _has_wide_kernel(x: Tensor) -> bool:
    """Whether half precision can be summed up in float32 without a float32 copy of the batch.

    CUDA has a kernel for it. The CPU's is less exact than the copy, MPS and XPU have none, and a compiler fuses the
    copy away.
    """
    if x.device.type != "cuda" or type(x) is not Tensor:
        return False
    return not (torch.compiler.is_compiling() or _needs_plain_operators())


def _plain_normalise(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    shape = along(1, x.ndim)
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    y = (x - mean.view(shape)) * scale.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)


class _BatchMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = _plain_moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor | None:
        x, mean = ctx.saved_tensors
        if x.numel() == 0:
            return None
        n = x.numel() // x.shape[1]
        # dL/dx = grad_mean / n + grad_var * 2 (x - mean) / n, which is one normalisation with unit variance.
        one = torch.ones_like(mean)
        if _needs_second_derivative():
            return _plain_normalise(x, mean, one, grad_var * (2 / n), grad_mean / n, 0.0)
        return F.batch_norm(x, mean, one, grad_var * (2 / n), grad_mean / n, False, 0.0, 0.0)


class _NormaliseWith(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, mean, var, weight, bias)
        ctx.eps = eps
        # torch.export keeps only these steps, and the fused kernel refuses statistics that require a gradient.
        return F.batch_norm(x, mean.detach(), var.detach(), weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight, bias = ctx.saved_tensors
        if _needs_second_derivative():
            return *_plain_gradients(grad, ctx.saved_tensors, ctx.eps), None
        scale = torch.ones_like(mean) if weight is None else weight
        if x.numel() == 0:
            zero = torch.zeros_like(mean)
            return torch.zeros_like(x), zero, zero, None if weight is None else zero, zero, None
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        rstd = (var + ctx.eps).rsqrt()
        grad_mean = -grad_bias * scale * rstd
        grad_var = -0.5 * grad_weight * scale * rstd.square()
        return (
            grad_x,
            grad_mean,
            grad_var,
            None if weight is None else grad_weight,
            None if bias is None else grad_bias,
            None,
        )


def _plain_gradients(grad: Tensor, inputs: tuple[Tensor | None, ...], eps: float) -> tuple[Tensor | None, ...]:
    """Gradients of `_plain_normalise` for its five tensors, themselves differentiable."""
    # Views stand for the inputs, one of which may have been computed from another: each counts on its own here.
    own = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    learning = [tensor for tensor in own if tensor is not None and tensor.requires_grad]
    x, mean, var, weight, bias = own
    assert x is not None
    assert mean is not None
    assert var is not None
    y = _plain_normalise(x, mean, var, weight, bias, eps)
    found = iter(torch.autograd.grad(y, learning, grad, create_graph=True))
    return tuple(next(found) if tensor is not None and tensor.requires_grad else None for tensor in own)


class _ScaleAndShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        rstd = (var.to(wide_dtype(var.dtype)) + eps).rsqrt()
        ctx.save_for_backward(rstd if weight is None else rstd * weight)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        if grad.dtype == scale.dtype:
            return grad * scale.view(along(1, grad.ndim)), None, None, None, None, None
        # the fused kernel multiplies half precision by float32 without a copy
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        return F.batch_norm(grad, zero, one, scale, None, False, 0.0, 0.0), None, None, None, None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.group), None


class _PooledMoments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels, wide = mean.numel(), widest_dtype(mean.device)
        # the count is filled in on the device: a copy from the host would wait for all that the device has yet to do
        local = torch.cat([mean.to(wide), var.to(wide), mean.new_full((1,), count, dtype=wide)])
        ranks = local.new_empty(dist.get_world_size(group) * local.numel())
        dist.all_gather_into_tensor(ranks, local, group=group)
        means, variances, counts = torch.split(ranks.view(-1, local.numel()), [channels, channels, 1], dim=1)
        total = counts.sum()
        share = counts / total
        pooled_mean = (share * means).sum(0)
        pooled_var = (share * (variances + (means - pooled_mean).square())).sum(0)
        mean_out, var_out = pooled_mean.to(mean.dtype), pooled_var.to(var.dtype)
        ctx.save_for_backward(mean, mean_out, mean.to(wide) - pooled_mean, count / total)
        ctx.group = group
        ctx.mark_non_differentiable(total)
        return mean_out, var_out, total

    @staticmethod
    def backward(
        ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        mean, pooled_mean, offset, share = ctx.saved_tensors
        if _needs_second_derivative():
            offset = (mean - pooled_mean).to(offset.dtype)
        grads = torch.stack((grad_mean, grad_var)).to(offset.dtype)
        to_mean, to_var = _SumOverRanks.apply(grads, ctx.group) * share
        # The pooled variance depends on the pooled mean only to second order: sum_r n_r (mean_r - mean) = 0.
        return (to_mean + 2 * offset * to_var).to(grad_mean.dtype), to_var.to(grad_var.dtype), None, None


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, differentiable.

    Args:
        x: (N, C, ...); an empty batch gives zeros.

    Returns:
        Mean and variance, each (C,), in float32 or wider.
    """
    if _needs_plain_operators():
        return _plain_moments(x)
    return _BatchMoments.apply(x)  # type: ignore[no-any-return]


def pooled_moments(mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the joined batch of all ranks of a group (Peng et al. 2018, MegDet), differentiable.

    `m = sum_r n_r m_r / n` and `v = sum_r n_r (v_r + (m_r - m)^2) / n` in float64 and in rank order, so that every
    rank holds the same bits. Ranks may hold different counts, and none.

    Args:
        mean: this rank's mean, (C,).
        var: this rank's biased variance, (C,).
        count: values per channel on this rank.
        group: the ranks that join; each must call this the same number of times, forward and backward.

    Returns:
        Mean (C,), biased variance (C,) and the count of all ranks, a float64 scalar.
    """
    return _PooledMoments.apply(mean, var, count, group)  # type: ignore[no-any-return]


def normalise_with(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias`, differentiable in everything but `eps`.

    Args:
        x: (N, C, ...).
        mean: (C,), in float32 or wider.
        var: (C,), likewise.
        weight: (C,) or None for one.
        bias: (C,) or None for zero.
        eps: added to the variance.

    Returns:
        A tensor like `x`.
    """
    # the fused kernels take one dtype for all that is (C,)
    weight, bias = (None if tensor is None else tensor.to(mean.dtype) for tensor in (weight, bias))
    if _needs_plain_operators():
        return _plain_normalise(x, mean, var, weight, bias, eps)
    return _NormaliseWith.apply(x, mean, var, weight, bias, eps)  # type: ignore[no-any-return]


def normalise_by_fixed(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """`normalise_with` for statistics without gradient: keeps `x` for backward only if weight or bias trains."""
    if not is_traced(x) and x.requires_grad and torch.is_grad_enabled() and not _needs_plain_operators():
        affine_learns = any(tensor is not None and tensor.requires_grad for tensor in (weight, bias))
        if not affine_learns:
            return _ScaleAndShift.apply(x, mean, var, weight, bias, eps)  # type: ignore[no-any-return]
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
