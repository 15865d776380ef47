"""The rules of normalising: one function for each value of `train_stats` and `eval_stats`.

A rule takes a layer's population, the options of its policy and a batch (N, C, ...), normalises the batch, applies
weight and bias, and in training brings the running statistics up to date. Every rule reads the running statistics from
before its own update. Where `torch.fx` traces a model the batch is no tensor yet; a rule then records one fused step,
or refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bnfinetune.bn.functional import batch_moments, is_traced, normalise_by_fixed, normalise_with, pooled_moments
from bnfinetune.bn.policy.state import Options
from bnfinetune.bn.population import Population

Rule = Callable[[Population, Options, Tensor], Tensor]


def normalise_by_batch(population: Population, options: Options, x: Tensor) -> Tensor:
    """Plain BN in training (Ioffe & Szegedy 2015): `xhat = (x - m_B) / sqrt(v_B + e)`."""
    if is_traced(x):
        return _trace_by_batch(population, x)
    population.require_many(x)
    return _normalise_in_parts(population, [x])


def _trace_by_batch(population: Population, x: Tensor) -> Tensor:
    """What `torch.fx` records of `normalise_by_batch`: the fused step that plain BN takes, its update included."""
    stats = population.stats
    if stats is None or not population.updates:
        return F.batch_norm(x, None, None, *population.affine, True, 0.0, population.eps)
    if population.momentum is None:
        population.require_tensor(x, "update_stats='cumulative'")
    momentum = cast(float, population.momentum)
    return F.batch_norm(x, stats.mean, stats.var, *population.affine, True, momentum, population.eps)


def normalise_by_ghosts(population: Population, options: Options, x: Tensor) -> Tensor:
    """Ghost BN (Hoffer et al. 2017): each group of `ghost_size` samples is normalised by its own statistics.

    The running statistics are updated group after group, `m <- (1-h)^G m + sum_j (1-h)^(G-j) h m_j`, and count one
    batch. The remainder is a group of its own, unless it would hold one value per channel: then it joins the last.
    """
    size = options.ghost_size
    population.require_tensor(x, "train_stats='ghost'")
    population.require_many(x)
    population.require_many(x[:size])
    whole, rest = divmod(x.shape[0], size)
    sizes = [size] * whole
    if rest * math.prod(x.shape[2:]) == 1 and whole:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return _normalise_in_parts(population, list(torch.split(x, sizes)) if len(sizes) > 1 else [x])


def _normalise_in_parts(population: Population, parts: list[Tensor]) -> Tensor:
    stats = population.stats
    weight, bias = population.affine
    if stats is None or not population.updates:
        outs = [F.batch_norm(part, None, None, weight, bias, True, 0.0, population.eps) for part in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs)
    # The fused kernel updates copies, so that an update can still be refused: on recomputation in backward, within
    # no_stat_updates, or where it is not finite.
    mean, var = stats.mean.clone(), stats.var.clone()
    if population.momentum is not None:
        outs = [
            F.batch_norm(part, mean, var, weight, bias, True, population.momentum, population.eps) for part in parts
        ]
        population.commit(mean, var)
        return outs[0] if len(outs) == 1 else torch.cat(outs)
    outs, sums = [], (torch.zeros_like(mean), torch.zeros_like(var))
    for part in parts:
        outs.append(F.batch_norm(part, mean, var, weight, bias, True, 1.0, population.eps))
        sums = (sums[0] + mean, sums[1] + var)
    population.update(sums[0] / len(parts), sums[1] / len(parts))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def normalise_by_running(population: Population, options: Options, x: Tensor) -> Tensor:
    """Frozen statistics: `xhat = (x - m) / sqrt(v + e)`; without a trained affine, nothing is kept for backward."""
    stats = population.require_stats()
    weight, bias = population.affine
    if population.updates:
        population.require_tensor(x, "train_stats='running' with an update")
        mean, var = population.before_update()
        population.update(*_unbiased(*batch_moments(x.detach()), x.numel() // x.shape[1]))
    else:
        mean, var = stats.mean, stats.var
    return normalise_by_fixed(x, mean, var, weight, bias, population.eps)


def normalise_by_ranks(population: Population, options: Options, x: Tensor) -> Tensor:
    """Synchronised BN (Peng et al. 2018): statistics of the joined batch of all ranks; `batch` without a group."""
    group = options.group()
    if group is None:
        return normalise_by_batch(population, options, x)
    stats = population.stats
    population.require_tensor(x, "train_stats='sync'")
    weight, bias = population.affine
    mean, var, total = pooled_moments(*batch_moments(x), x.numel() // max(x.shape[1], 1), group)
    if stats is not None and population.updates:
        population.update(*_unbiased(mean.detach(), var.detach(), total))
    return normalise_with(x, mean, var, weight, bias, population.eps)


def renormalise(population: Population, options: Options, x: Tensor) -> Tensor:
    """Batch renormalisation (Ioffe 2017): `xhat = (x - m_B) / s_B * r + d`, `s = sqrt(v + e)`.

    `r = clip(s_B / s, 1/rmax, rmax)` and `d = clip((m_B - m) / s, -dmax, dmax)` carry no gradient. The bounds are
    (1, 0), plain BN, for `renorm_warmup` updates, and then grow linearly to (rmax, dmax) over `renorm_ramp` updates.
    """
    population.require_tensor(x, "train_stats='renorm'")
    population.require_many(x)
    weight, bias = population.affine
    mean, var = population.before_update()
    with torch.no_grad():
        batch_mean, batch_var = batch_moments(x.detach())  # forward mode heeds the second alone
        rmax, dmax = _renorm_bounds(population, options)
        std = (var + population.eps).sqrt()
        r = torch.clamp((batch_var + population.eps).sqrt() / std, 1 / rmax, rmax)
        d = torch.clamp((batch_mean - mean) / std, -dmax, dmax)
        if population.updates:
            population.update(*_unbiased(batch_mean, batch_var, x.numel() // x.shape[1]))
        population.grow_older()
    scale = r if weight is None else r * weight
    shift = d if weight is None else d * weight
    return F.batch_norm(x, None, None, scale, shift if bias is None else shift + bias, True, 0.0, population.eps)


def _renorm_bounds(population: Population, options: Options) -> tuple[Any, Any]:
    """The present (rmax, dmax) of the renorm schedule."""
    age = population.renorm_age()
    if age is None:
        return options.renorm_rmax, options.renorm_dmax
    ramp = options.renorm_ramp
    grown = ((age - options.renorm_warmup + (ramp == 0)) / max(ramp, 1)).clamp(0, 1)
    return 1 + grown * (options.renorm_rmax - 1), grown * options.renorm_dmax


def normalise_at_random(population: Population, options: Options, x: Tensor) -> Tensor:
    """Stochastic normalisation (Kou et al. 2020): each channel by batch statistics with probability p, else by running.

    One draw `S_c ~ Bernoulli(p)` per forward and channel, from the default generator of the batch's device:
    `xhat = S (x - m_B) / sqrt(v_B + e) + (1 - S) (x - m) / sqrt(v + e)`.
    """
    population.require_tensor(x, "train_stats='stochastic'")
    population.require_many(x)
    weight, bias = population.affine
    mean, var = population.before_update()
    batch_mean, batch_var = batch_moments(x)
    if population.updates:
        population.update(*_unbiased(batch_mean.detach(), batch_var.detach(), x.numel() // x.shape[1]))
    by_batch = torch.rand(mean.shape, device=x.device) < options.stochastic_p
    chosen_mean = torch.where(by_batch, batch_mean, mean.to(batch_mean.dtype))
    chosen_var = torch.where(by_batch, batch_var, var.to(batch_var.dtype))
    return normalise_with(x, chosen_mean, chosen_var, weight, bias, population.eps)


def evaluate_by_running(population: Population, options: Options, x: Tensor) -> Tensor:
    """Plain BN in evaluation: `xhat = (x - m) / sqrt(v + e)`."""
    stats = population.require_stats()
    return F.batch_norm(x, stats.mean, stats.var, *population.affine, False, 0.0, population.eps)


def evaluate_by_batch(population: Population, options: Options, x: Tensor) -> Tensor:
    """Statistics of the very batch that is evaluated, as in TENT (Wang et al. 2021); nothing is updated."""
    return F.batch_norm(x, None, None, *population.affine, True, 0.0, population.eps)


def evaluate_by_mix(population: Population, options: Options, x: Tensor) -> Tensor:
    """Prior mixing (Schneider et al. 2020): `m' = N/(N+n) m + n/(N+n) m_B`, likewise `v'`, for a batch of n samples.

    `N = mix_prior` says how many samples the running statistics are worth: 0 is `batch`, infinity is `running`.
    """
    population.require_tensor(x, "eval_stats='mix'")
    stats = population.require_stats()
    samples = x.shape[0]
    share = samples / (options.mix_prior + samples) if samples else 0.0
    batch_mean, batch_var = batch_moments(x)
    mean = torch.lerp(stats.mean.to(batch_mean.dtype), batch_mean, share)
    var = torch.lerp(stats.var.to(batch_var.dtype), batch_var, share)
    return normalise_with(x, mean, var, *population.affine, population.eps)


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
