"""The rules of normalising: one function for each value of `train_stats` and `eval_stats`.

A rule takes a layer that switches.py has taken over and a batch (N, C, ...), normalises the batch, applies weight and
bias, and in training brings the running statistics up to date. Every rule reads the running statistics from before
its own update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bnfinetune.bn.normalise import batch_moments, normalise_by_fixed, normalise_with, pooled_moments

if TYPE_CHECKING:
    from bnfinetune.bn.switches import SwitchedBN

Rule = Callable[["SwitchedBN", Tensor], Tensor]


def normalise_by_batch(layer: SwitchedBN, x: Tensor) -> Tensor:
    """Plain BN in training (Ioffe & Szegedy 2015): `xhat = (x - m_B) / sqrt(v_B + e)`."""
    layer._bn_require_many(x)
    return _normalise_in_parts(layer, [x])


def normalise_by_ghosts(layer: SwitchedBN, x: Tensor) -> Tensor:
    """Ghost BN (Hoffer et al. 2017): each group of `ghost_size` samples is normalised by its own statistics.

    The running statistics are updated group after group, `m <- (1-h)^G m + sum_j (1-h)^(G-j) h m_j`, and count one
    batch. The remainder is a group of its own, unless it would hold one value per channel: then it joins the last.
    """
    size = layer._bn_state.options.ghost_size
    layer._bn_require_many(x)
    layer._bn_require_many(x[:size])
    whole, rest = divmod(x.shape[0], size)
    sizes = [size] * whole
    if rest * math.prod(x.shape[2:]) == 1 and whole:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return _normalise_in_parts(layer, list(torch.split(x, sizes)) if len(sizes) > 1 else [x])


def _normalise_in_parts(layer: SwitchedBN, parts: list[Tensor]) -> Tensor:
    stats = layer._bn_stats()
    weight, bias = layer._bn_affine()
    if stats is None or not layer._bn_state.updates:
        outs = [F.batch_norm(part, None, None, weight, bias, True, 0.0, layer.eps) for part in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs)
    # The fused kernel updates copies, so that an update can still be refused: on recomputation in backward, within
    # no_stat_updates, or where it is not finite.
    mean, var = stats.mean.clone(), stats.var.clone()
    if layer.momentum is not None:
        outs = [F.batch_norm(part, mean, var, weight, bias, True, layer.momentum, layer.eps) for part in parts]
        layer._bn_commit(stats, mean, var)
        return outs[0] if len(outs) == 1 else torch.cat(outs)
    outs, sums = [], (torch.zeros_like(mean), torch.zeros_like(var))
    for part in parts:
        outs.append(F.batch_norm(part, mean, var, weight, bias, True, 1.0, layer.eps))
        sums = (sums[0] + mean, sums[1] + var)
    layer._bn_update(stats, sums[0] / len(parts), sums[1] / len(parts))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def normalise_by_running(layer: SwitchedBN, x: Tensor) -> Tensor:
    """Frozen statistics: `xhat = (x - m) / sqrt(v + e)`; without a trained affine, nothing is kept for backward."""
    stats = layer._bn_require_stats()
    weight, bias = layer._bn_affine()
    if layer._bn_state.updates:
        mean, var = layer._bn_before_update(stats)
        layer._bn_update(stats, *_unbiased(*batch_moments(x.detach()), x.numel() // x.shape[1]))
    else:
        mean, var = stats.mean, stats.var
    return normalise_by_fixed(x, mean, var, weight, bias, layer.eps)


def normalise_by_ranks(layer: SwitchedBN, x: Tensor) -> Tensor:
    """Synchronised BN (Peng et al. 2018): statistics of the joined batch of all ranks; `batch` without a group."""
    group = layer._bn_state.options.group()
    if group is None:
        return normalise_by_batch(layer, x)
    stats = layer._bn_stats()
    weight, bias = layer._bn_affine()
    mean, var, total = pooled_moments(*batch_moments(x), x.numel() // max(x.shape[1], 1), group)
    if stats is not None and layer._bn_state.updates:
        layer._bn_update(stats, *_unbiased(mean.detach(), var.detach(), total))
    return normalise_with(x, mean, var, weight, bias, layer.eps)


def renormalise(layer: SwitchedBN, x: Tensor) -> Tensor:
    """Batch renormalisation (Ioffe 2017): `xhat = (x - m_B) / s_B * r + d`, `s = sqrt(v + e)`.

    `r = clip(s_B / s, 1/rmax, rmax)` and `d = clip((m_B - m) / s, -dmax, dmax)` carry no gradient. The bounds are
    (1, 0), plain BN, for `renorm_warmup` updates, and then grow linearly to (rmax, dmax) over `renorm_ramp` updates.
    """
    layer._bn_require_many(x)
    stats = layer._bn_require_stats()
    weight, bias = layer._bn_affine()
    mean, var = layer._bn_before_update(stats)
    with torch.no_grad():
        batch_mean, batch_var = batch_moments(x)
        rmax, dmax = layer._bn_renorm_bounds()
        std = (var + layer.eps).sqrt()
        r = torch.clamp((batch_var + layer.eps).sqrt() / std, 1 / rmax, rmax)
        d = torch.clamp((batch_mean - mean) / std, -dmax, dmax)
        if layer._bn_state.updates:
            layer._bn_update(stats, *_unbiased(batch_mean, batch_var, x.numel() // x.shape[1]))
        layer._bn_grow_older()
    scale = r if weight is None else r * weight
    shift = d if weight is None else d * weight
    return F.batch_norm(x, None, None, scale, shift if bias is None else shift + bias, True, 0.0, layer.eps)


def normalise_at_random(layer: SwitchedBN, x: Tensor) -> Tensor:
    """Stochastic normalisation (Kou et al. 2020): each channel by batch statistics with probability p, else by running.

    One draw `S_c ~ Bernoulli(p)` per forward and channel, from the default generator of the batch's device:
    `xhat = S (x - m_B) / sqrt(v_B + e) + (1 - S) (x - m) / sqrt(v + e)`.
    """
    layer._bn_require_many(x)
    stats = layer._bn_require_stats()
    weight, bias = layer._bn_affine()
    mean, var = layer._bn_before_update(stats)
    batch_mean, batch_var = batch_moments(x)
    if layer._bn_state.updates:
        layer._bn_update(stats, *_unbiased(batch_mean.detach(), batch_var.detach(), x.numel() // x.shape[1]))
    by_batch = torch.rand(mean.shape, device=x.device) < layer._bn_state.options.stochastic_p
    chosen_mean = torch.where(by_batch, batch_mean, mean.to(batch_mean.dtype))
    chosen_var = torch.where(by_batch, batch_var, var.to(batch_var.dtype))
    return normalise_with(x, chosen_mean, chosen_var, weight, bias, layer.eps)


def evaluate_by_running(layer: SwitchedBN, x: Tensor) -> Tensor:
    """Plain BN in evaluation: `xhat = (x - m) / sqrt(v + e)`."""
    stats = layer._bn_require_stats()
    return F.batch_norm(x, stats.mean, stats.var, *layer._bn_affine(), False, 0.0, layer.eps)


def evaluate_by_batch(layer: SwitchedBN, x: Tensor) -> Tensor:
    """Statistics of the very batch that is evaluated, as in TENT (Wang et al. 2021); nothing is updated."""
    return F.batch_norm(x, None, None, *layer._bn_affine(), True, 0.0, layer.eps)


def evaluate_by_mix(layer: SwitchedBN, x: Tensor) -> Tensor:
    """Prior mixing (Schneider et al. 2020): `m' = N/(N+n) m + n/(N+n) m_B`, likewise `v'`, for a batch of n samples.

    `N = mix_prior` says how many samples the running statistics are worth: 0 is `batch`, infinity is `running`.
    """
    stats = layer._bn_require_stats()
    samples = x.shape[0]
    share = samples / (layer._bn_state.options.mix_prior + samples) if samples else 0.0
    batch_mean, batch_var = batch_moments(x)
    mean = torch.lerp(stats.mean.to(batch_mean.dtype), batch_mean, share)
    var = torch.lerp(stats.var.to(batch_var.dtype), batch_var, share)
    return normalise_with(x, mean, var, *layer._bn_affine(), layer.eps)


def _unbiased(mean: Tensor, var: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """What PyTorch keeps in `running_var` is the unbiased variance: `v n / (n - 1)`; not finite where n is 1."""
    if isinstance(count, Tensor):
        return mean, var * (count / (count - 1)).to(var.dtype)
    return mean, var * (count / (count - 1) if count > 1 else math.nan)


TRAIN_RULES: dict[str, Rule] = {
    "batch": normalise_by_batch,
    "running": normalise_by_running,
    "sync": normalise_by_ranks,
    "ghost": normalise_by_ghosts,
    "renorm": renormalise,
    "stochastic": normalise_at_random,
}

EVAL_RULES: dict[str, Rule] = {
    "running": evaluate_by_running,
    "batch": evaluate_by_batch,
    "mix": evaluate_by_mix,
}
