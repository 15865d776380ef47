"""merge_running_stats on real gloo ranks against NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

from bnfinetune.bn import BNPolicy, apply_policy, domain
from bnfinetune.bn.statistics.moments import all_reduce_moments
from bnfinetune.bn.statistics.ranks import merge_running_stats
from bnfinetune.errors import StatisticsError
from tests.bn.distributed import run_ranks
from tests.bn.statistics.oracle import moments_of

COUNTS = (30, 0, 12)


def model_of(rank: int, name: str = "resnet18") -> nn.Module:
    """The same weights on each rank, running statistics of its own."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2)
    generator = torch.Generator().manual_seed(rank)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) + 2 * rank)
        elif key.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        elif key.endswith("num_batches_tracked"):
            buffer.fill_(10 + rank)
    return model


def state_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy().copy() for key, value in model.state_dict().items()}


def merge_rank(rank: int, name: str) -> tuple[dict, dict, bool]:
    model = model_of(rank, name)
    before = state_of(model)
    buffers = dict(model.named_buffers())
    merge_running_stats(model, COUNTS[rank])
    return before, state_of(model), all(buffers[key] is buffer for key, buffer in model.named_buffers())


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_merged_statistics_obey_the_law_of_total_variance(name, tmp_path):
    befores, afters, in_place = zip(*run_ranks(3, merge_rank, tmp_path, name), strict=True)
    assert all(in_place)
    share = np.array(COUNTS)[:, None] / sum(COUNTS)
    for key, after in afters[0].items():
        for other in afters[1:]:
            assert after.tobytes() == other[key].tobytes(), key
        old = np.stack([before[key] for before in befores]).astype(np.float64)
        if key.endswith("running_mean"):
            expected = (share * old).sum(0)
        elif key.endswith("running_var"):
            means = np.stack([b[key.replace("_var", "_mean")] for b in befores]).astype(np.float64)
            expected = (share * (old + (means - (share * means).sum(0)) ** 2)).sum(0)
        else:
            expected = old.max(0)
        np.testing.assert_allclose(after, expected, rtol=1e-6, atol=1e-7, err_msg=key)


def domains_of_rank(rank: int) -> dict:
    model = apply_policy(nn.Sequential(nn.BatchNorm2d(2)), BNPolicy(domains="target"))
    with domain(model, "target"), torch.no_grad():
        model(torch.full((1, 2, 2, 2), 10.0 * rank) + torch.arange(4.0).view(2, 2))
    merge_running_stats(model, 1)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_the_statistics_of_domains_are_merged_too(tmp_path):
    first, second = run_ranks(2, domains_of_rank, tmp_path)
    (key,) = [name for name in first if name.endswith("target_running_mean")]
    torch.testing.assert_close(first[key], torch.full((2,), 0.1 * (1.5 + 5)))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def faults_of_rank(rank: int) -> list[str]:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    messages = []

    def attempt(model: nn.Module, count: float) -> None:
        before = state_of(model)
        with pytest.raises(StatisticsError) as caught:
            merge_running_stats(model, count)
        messages.append(str(caught.value))
        for key, value in state_of(model).items():
            np.testing.assert_array_equal(value, before[key])

    attempt(model, 0)
    attempt(model, -1 if rank else 5)
    attempt(model if rank else nn.Sequential(nn.BatchNorm2d(3)), 5)
    if rank:
        model[1].running_var[2] = float("nan")
    attempt(model, 5)
    return messages


def test_a_fault_on_one_rank_is_raised_on_all_and_changes_nothing(tmp_path):
    (empty, negative, foreign, nan), (_, negative_1, foreign_1, nan_1) = run_ranks(2, faults_of_rank, tmp_path)
    assert "count=0 everywhere" in empty
    assert "rank 1 failed with StatisticsError: count=-1" in negative
    assert negative_1.startswith("count=-1")
    assert "rank 1 has other BN layers than rank 0" in foreign
    assert foreign.split("(")[0] == foreign_1.split("(")[0]
    assert "rank 1 failed" in nan
    assert "'1' has a running_var that is not finite" in nan_1


def all_reduce_rank(rank: int) -> list:
    shards = (torch.arange(12.0).view(4, 3), torch.empty(0, 3), torch.full((1, 3), 100.0))
    return all_reduce_moments([moments_of(shards[rank]), moments_of(shards[rank] * 2)])


def test_all_reduce_of_unequal_and_empty_shards(tmp_path):
    by_rank = run_ranks(3, all_reduce_rank, tmp_path)
    whole = torch.cat([torch.arange(12.0).view(4, 3), torch.full((1, 3), 100.0)]).double()
    for moments in by_rank:
        for scale, part in zip((1, 2), moments, strict=True):
            assert part.count == 5
            np.testing.assert_allclose(part.mean, scale * whole.mean(0), rtol=1e-12)
            np.testing.assert_allclose(part.var, whole.var(0, correction=0) * scale**2, rtol=1e-12)
            assert torch.equal(part.m2, by_rank[0][scale - 1].m2)


def test_one_process_needs_no_merging():
    model = model_of(0)
    before = state_of(model)
    merge_running_stats(model, 7)
    assert all(np.array_equal(value, before[key]) for key, value in state_of(model).items())


def report_rank(rank: int, folder: str) -> tuple[str, dict, list[float], bool]:
    model = model_of(0)
    for buffer in model.buffers():
        if buffer.ndim and rank != 1:  # rank 1 has seen nothing, and does not count
            buffer.copy_(torch.full_like(buffer, 1.0))
    model.layer1[0].bn1.running_mean.fill_(3.0 * rank)
    torch.set_default_device("meta")  # nothing may be made there
    try:
        report = merge_running_stats(model, COUNTS[rank])
    finally:
        torch.set_default_device(None)
    report.save(f"{folder}/{rank}.json")
    return str(report), report.apart, list(report.counts), model.bn1.running_mean.isfinite().all().item()


def test_the_report_says_what_was_merged_and_how_far_ranks_were_apart(tmp_path):
    reports = run_ranks(3, report_rank, tmp_path, str(tmp_path))
    assert reports[0] == reports[1] == reports[2]
    text, apart, counts, finite = reports[0]
    assert finite
    assert counts == list(COUNTS)
    # means 0 and 6 of variance 1, of 30 and 12 images: 12/7 together, and variance 1 + 36 * 30 * 12 / 42^2
    assert apart.pop("layer1.0.bn1") == pytest.approx((6 - 12 / 7) / (1 + 36 * 360 / 42**2) ** 0.5)
    assert set(apart.values()) == {0.0}
    assert "3 ranks merged in 20 layers (42 images: 30 + 0 + 12)" in text
    assert "(layer1.0.bn1)" in text
    assert json.loads((tmp_path / "2.json").read_text())["counts"] == counts


def test_one_process_has_nothing_to_merge():
    model = model_of(0)
    before = state_of(model)
    report = merge_running_stats(model, 5)
    assert (report.counts, report.apart) == ((5.0,), {})
    assert "nothing to merge" in str(report)
    assert all((before[key] == value).all() for key, value in state_of(model).items())
