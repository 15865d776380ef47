"""Normalising with given statistics, and the moments of a batch: the differentiable steps that PyTorch has only fused.

Each function takes one fused pass over the batch forward and backward, keeps the batch's dtype and memory format, and
computes statistics in float32 or better.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def along(axis: int, ndim: int) -> tuple[int, ...]:
    """The shape in which values (C,) multiply a tensor of `ndim` dimensions whose channels run along an axis."""
    return tuple(-1 if dim == axis else 1 for dim in range(ndim))


class _BatchMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = [0, *range(2, x.ndim)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        ctx.filled = x.numel() > 0
        if not ctx.filled:
            mean = wide.new_zeros(x.shape[1])
            return mean, mean.clone()
        var, mean = torch.var_mean(wide, dims, correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor | None:
        if not ctx.filled:
            return None
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        # dL/dx = grad_mean / n + grad_var * 2 (x - mean) / n, written as one normalisation with unit variance.
        one = torch.ones_like(mean)
        return F.batch_norm(x, mean, one, grad_var * (2 / n), grad_mean / n, False, 0.0, 0.0)


class _NormaliseWith(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps = eps
        # torch.export keeps only these steps, and the fused kernel refuses statistics that require a gradient.
        return F.batch_norm(x, mean.detach(), var.detach(), weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight = ctx.saved_tensors
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
        return grad_x, grad_mean, grad_var, None if weight is None else grad_weight, grad_bias, None


class _ScaleAndShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        rstd = (var + eps).rsqrt()
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


class _PooledMoments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = mean.numel()
        local = torch.cat([mean.double(), var.double(), mean.new_tensor([count], dtype=torch.float64)])
        ranks = local.new_empty(dist.get_world_size(group) * local.numel())
        dist.all_gather_into_tensor(ranks, local, group=group)
        means, variances, counts = torch.split(ranks.view(-1, local.numel()), [channels, channels, 1], dim=1)
        total = counts.sum()
        share = counts / total
        pooled_mean = (share * means).sum(0)
        pooled_var = (share * (variances + (means - pooled_mean).square())).sum(0)
        ctx.save_for_backward(mean.double() - pooled_mean, count / total)
        ctx.group = group
        ctx.mark_non_differentiable(total)
        return pooled_mean.to(mean.dtype), pooled_var.to(var.dtype), total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        offset, share = ctx.saved_tensors
        grads = torch.stack((grad_mean, grad_var)).double()
        dist.all_reduce(grads, group=ctx.group)
        to_mean, to_var = grads * share
        # The pooled variance depends on the pooled mean only to second order: sum_r n_r (mean_r - mean) = 0.
        return (to_mean + 2 * offset * to_var).to(grad_mean.dtype), to_var.to(grad_var.dtype), None, None


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, differentiable.

    Args:
        x: (N, C, ...); an empty batch gives zeros.

    Returns:
        Mean and variance, each (C,), in float32 or wider.
    """
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
        mean: (C,).
        var: (C,).
        weight: (C,) or None for one.
        bias: (C,) or None for zero.
        eps: added to the variance.

    Returns:
        A tensor like `x`.
    """
    return _NormaliseWith.apply(x, mean, var, weight, bias, eps)  # type: ignore[no-any-return]


def normalise_by_fixed(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """`normalise_with` for statistics without gradient: keeps `x` for backward only if weight or bias trains."""
    affine_learns = any(tensor is not None and tensor.requires_grad for tensor in (weight, bias))
    if x.requires_grad and torch.is_grad_enabled() and not affine_learns:
        return _ScaleAndShift.apply(x, mean, var, weight, bias, eps)  # type: ignore[no-any-return]
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
