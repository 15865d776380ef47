"""Moments against direct float64 computation, and their algebra under arbitrary splits."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfinetune.bn.statistics.moments import Moments, all_reduce_moments
from tests.bn.statistics.oracle import moments_of

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
sizes = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)


def values(size: int, seed: int = 0, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * torch.randn(size, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population variance by exactly rounded sums (math.fsum)."""
    channels = x.double().transpose(0, 1).flatten(1).numpy()
    means = [math.fsum(c) / len(c) for c in channels]
    variances = [math.fsum((v - m) ** 2 for v in c) / len(c) for c, m in zip(channels, means, strict=True)]
    return np.array(means), np.array(variances)


def assert_describes(moments: Moments, x: torch.Tensor, rtol: float = 1e-11) -> None:
    mean, var = oracle(x)
    assert moments.count == x.numel() // x.shape[1]
    np.testing.assert_allclose(moments.mean, mean, rtol=rtol, atol=1e-13)
    np.testing.assert_allclose(moments.var, var, rtol=rtol)


@SETTINGS
@given(sizes=sizes, mean=st.sampled_from([0.0, 1.0, 1000.0]), std=st.sampled_from([0.01, 1.0]))
def test_merging_any_split_equals_the_whole(sizes, mean, std):
    x = values(sum(sizes), mean=mean, std=std)
    merged = reduce(Moments.merge, (moments_of(part) for part in x.split(sizes)))
    assert_describes(merged, x, rtol=1e-9)


@SETTINGS
@given(sizes=sizes)
def test_pooling_at_once_equals_merging_one_by_one(sizes):
    parts = [moments_of(part) for part in values(sum(sizes), mean=50).split(sizes)]
    merged = reduce(Moments.merge, parts)
    counts = torch.tensor([float(part.count) for part in parts])
    pooled = Moments.pool(counts, torch.stack([p.mean for p in parts]), torch.stack([p.m2 for p in parts]))
    assert pooled.count == merged.count
    torch.testing.assert_close(pooled.mean, merged.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(pooled.m2, merged.m2, rtol=1e-12, atol=0)


@SETTINGS
@given(sizes=st.tuples(*[st.integers(0, 9)] * 3))
def test_merging_is_associative_and_commutative(sizes):
    a, b, c = (moments_of(values(size, seed, mean=seed)) for seed, size in enumerate(sizes))
    left, right, turned = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(b).merge(a)
    for other in (right, turned):
        assert left.count == other.count
        torch.testing.assert_close(left.mean, other.mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(left.m2, other.m2, rtol=1e-12, atol=1e-13)


def test_empty_moments_change_nothing():
    moments = moments_of(values(5))
    assert moments.merge(Moments.empty(3)) is moments
    assert Moments.empty(3).merge(moments) is moments


def test_a_single_value_has_variance_zero():
    single = moments_of(torch.tensor([[3.0, -4.0]]))
    assert single.count == 1
    assert single.mean.tolist() == [3.0, -4.0]
    assert single.var.tolist() == [0.0, 0.0]


def test_variance_never_turns_negative_where_naive_fp32_does():
    x = (1000 + 0.01 * torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))).float()
    naive = x.square().mean(0) - x.mean(0).square()
    assert (naive - x.double().var(0, correction=0).float()).abs().max() > 1e-4  # the pitfall is real
    assert_describes(reduce(Moments.merge, (moments_of(part) for part in x.split(33))), x, rtol=1e-9)


def test_equal_means_pool_without_rounding():
    mean = torch.tensor([0.1, 1e9 / 3], dtype=torch.float64)
    pooled = Moments.pool(torch.tensor([1.0, 2.0, 4.0]), mean.expand(3, 2), torch.zeros(3, 2))
    assert torch.equal(pooled.mean, mean)
    assert torch.equal(pooled.m2, torch.zeros(2, dtype=torch.float64))


def test_without_process_group_all_reduce_gives_the_same_moments():
    moments = [moments_of(values(4)), Moments.empty(2)]
    reduced = all_reduce_moments(moments)
    assert [r.count for r in reduced] == [8, 0]
    for before, after in zip(moments, reduced, strict=True):
        assert torch.equal(before.mean, after.mean)
        assert torch.equal(before.m2, after.m2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_values_are_read_in_float64(dtype):
    x = values(64).to(dtype)
    assert_describes(moments_of(x), x)
