"""Each normalisation written out from its paper's formula, in plain differentiable PyTorch; meant for float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    output: Tensor
    mean: Tensor
    var: Tensor


def _channels(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (x.ndim - 2))


def moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean, biased variance and count per channel."""
    dims = [d for d in range(x.ndim) if d != 1]
    count = x.numel() // x.shape[1]
    mean = x.sum(dims) / count
    var = (x - _channels(mean, x)).square().sum(dims) / count
    return mean, var, count


def normal(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    xhat = (x - _channels(mean, x)) / (_channels(var, x) + eps).sqrt()
    return xhat * _channels(weight, x) + _channels(bias, x)


def _ema(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    return (1 - momentum) * old + momentum * new.detach()


def batch(x, weight, bias, mean, var, *, eps, momentum) -> Result:
    m, v, n = moments(x)
    y = normal(x, m, v, weight, bias, eps)
    return Result(y, _ema(mean, m, momentum), _ema(var, v * n / (n - 1), momentum))


def running(x, weight, bias, mean, var, *, eps, momentum) -> Result:
    m, v, n = moments(x)
    y = normal(x, mean, var, weight, bias, eps)
    return Result(y, _ema(mean, m, momentum), _ema(var, v * n / (n - 1), momentum))


def ghost(x, weight, bias, mean, var, *, eps, momentum, sizes) -> Result:
    """Hoffer et al. 2017, algorithm 1, with the closed form of its update over the groups."""
    groups = [moments(part) for part in x.split(sizes)]
    y = torch.cat([normal(p, m, v, weight, bias, eps) for p, (m, v, _) in zip(x.split(sizes), groups, strict=True)])
    count = len(groups)
    new_mean, new_var = (1 - momentum) ** count * mean, (1 - momentum) ** count * var
    for j, (m, v, n) in enumerate(groups, 1):
        share = momentum * (1 - momentum) ** (count - j)
        new_mean = new_mean + share * m.detach()
        new_var = new_var + share * v.detach() * n / (n - 1)
    return Result(y, new_mean, new_var)


def renorm(x, weight, bias, mean, var, *, eps, momentum, rmax, dmax) -> Result:
    """Ioffe 2017, algorithm 1; sigma is the root of torch's running variance and eps."""
    m, v, n = moments(x)
    sigma_batch, sigma = (v + eps).sqrt(), (var + eps).sqrt()
    r = (sigma_batch / sigma).clamp(1 / rmax, rmax).detach()
    d = ((m - mean) / sigma).clamp(-dmax, dmax).detach()
    xhat = (x - _channels(m, x)) / _channels(sigma_batch, x) * _channels(r, x) + _channels(d, x)
    y = xhat * _channels(weight, x) + _channels(bias, x)
    return Result(y, _ema(mean, m, momentum), _ema(var, v * n / (n - 1), momentum))


def stochastic(x, weight, bias, mean, var, *, eps, momentum, by_batch) -> Result:
    """Kou et al. 2020, equation 5, for a given draw (C,) of ones and zeros."""
    m, v, n = moments(x)
    s = _channels(by_batch.to(x.dtype), x)
    one, zero = torch.ones_like(weight), torch.zeros_like(bias)
    xhat = s * normal(x, m, v, one, zero, eps) + (1 - s) * normal(x, mean, var, one, zero, eps)
    y = xhat * _channels(weight, x) + _channels(bias, x)
    return Result(y, _ema(mean, m, momentum), _ema(var, v * n / (n - 1), momentum))


def mix(x, weight, bias, mean, var, *, eps, prior) -> Tensor:
    """Schneider et al. 2020, equation 2."""
    m, v, _ = moments(x)
    n = x.shape[0]
    mixed_mean = prior / (prior + n) * mean + n / (prior + n) * m
    mixed_var = prior / (prior + n) * var + n / (prior + n) * v
    return normal(x, mixed_mean, mixed_var, weight, bias, eps)
