"""The stopping rule: errors as large as they are estimated, honest about few, correlated and sorted batches."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnfinetune.bn.statistics.moments import Moments, Rows
from bnfinetune.bn.statistics.precise import precise_bn
from bnfinetune.bn.statistics.sampling_error import MAX_GROUPS, BatchGroups, sampling_errors

CHANNELS = 3


def rows_of(batches: np.ndarray) -> Rows:
    """Statistics of batches given as (batches, values, channels)."""
    x = torch.from_numpy(batches)
    counts = torch.full((len(x),), float(x.shape[1]), dtype=torch.float64)
    return Rows(counts, x.mean(1), x.var(1, correction=0) * x.shape[1])


def estimate(batches: np.ndarray, chunk: int = 5) -> tuple[Moments, tuple]:
    groups = BatchGroups(batches.shape[2])
    for part in np.split(batches, range(chunk, len(batches), chunk)):
        groups.add(rows_of(part))
    moments = groups.moments()
    (error,) = sampling_errors([groups], [moments], [0.0])
    return moments, error


@pytest.mark.parametrize("count", [1, 7, 63, 64, 65, 1000])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_groups_hold_all_batches_in_bounded_memory(count, chunk):
    batches = np.random.default_rng(0).normal(5, 2, (count, 4, CHANNELS))
    groups = BatchGroups(CHANNELS)
    for part in np.split(batches, range(chunk, count, chunk)):
        groups.add(rows_of(part))
    moments, values = groups.moments(), batches.reshape(-1, CHANNELS)
    assert moments.count == len(values)
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.var, values.var(0), rtol=1e-12)
    assert len(groups.rows.counts) <= MAX_GROUPS


@pytest.mark.parametrize("count", [20, 300])
def test_estimated_errors_are_as_large_as_the_actual_ones(count):
    """Over many repetitions, the root mean square error of one channel is what is estimated."""
    generator, actual, estimated, correlations = np.random.default_rng(1), [], [], []
    for _ in range(150 if count < 100 else 60):
        batches = generator.exponential(1.0, (count, 8, 1))  # mean 1, variance 1, skewed
        batches += generator.normal(0, 0.5, (count, 1, 1))  # what the values of a batch have in common
        moments, error = estimate(batches)
        actual.append((moments.mean.item() - 1, moments.var.item() / 1.25 - 1))
        estimated.append((error.mean * np.sqrt(moments.var.item() / 1.25), error.var * moments.var.item() / 1.25))
        correlations.append(error.correlation)
    rms = np.sqrt(np.square(actual).mean(0))
    assert np.all(np.abs(np.sqrt(np.square(estimated).mean(0)) / rms - 1) < 0.25)
    assert abs(np.mean(correlations)) < 0.05


def test_neighbours_that_resemble_each_other_raise_the_estimated_error():
    generator = np.random.default_rng(2)
    noise = generator.normal(size=(200, 1, 1))
    drift = [noise[0]]
    for step in noise[1:]:
        drift.append(0.9 * drift[-1] + np.sqrt(1 - 0.9**2) * step)
    batches = np.array(drift) + 0.1 * generator.normal(size=(200, 8, 1))
    shuffled = generator.permutation(batches)
    _, correlated = estimate(batches)
    _, independent = estimate(shuffled)
    assert correlated.correlation > 0.3  # of groups of four
    assert abs(independent.correlation) < 0.3
    assert correlated.mean > 2.5 * independent.mean  # sqrt(19) = 4.4 for endless data


def test_errors_are_measured_as_the_layer_feels_them():
    """A dead channel's tiny variance may be uncertain: eps hides it."""
    batches = np.random.default_rng(3).normal(size=(16, 8, 1)) * 1e-6
    groups = BatchGroups(1)
    groups.add(rows_of(batches))
    moments = [groups.moments()]
    (raw,), (felt,) = sampling_errors([groups], moments, [0.0]), sampling_errors([groups], moments, [1e-5])
    assert raw.var > 0.05
    assert felt.var < 1e-6


# --- precise_bn under a tolerance


def loader(
    count: int, labels: torch.Tensor | None = None, offsets: torch.Tensor | None = None, **arguments
) -> DataLoader:
    x = torch.randn(count, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x if offsets is None else x + offsets.view(-1, 1, 1, 1)
    data = TensorDataset(x) if labels is None else TensorDataset(x, labels)
    return DataLoader(data, 16, generator=torch.Generator().manual_seed(0), **arguments)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, 4, 3), nn.BatchNorm2d(4))


def test_the_pass_stops_when_it_is_sure_and_the_truth_is_near():
    data, full, early = loader(6400, shuffle=True), model(), model()
    precise_bn(full, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = precise_bn(early, data, tolerance=0.02)
    assert report.converged
    assert report.error <= 0.02
    assert 8 * 16 <= report.samples < 6400 / 2
    for ours, truth in zip((early[0], early[2]), (full[0], full[2]), strict=True):
        assert ((ours.running_mean - truth.running_mean).abs() / truth.running_var.sqrt()).max() < 4 * 0.02
        assert (ours.running_var / truth.running_var - 1).abs().max() < 4 * 0.02


def test_a_smaller_tolerance_takes_more_samples():
    samples = [precise_bn(model(), loader(25600, shuffle=True), tolerance=t).samples for t in (0.04, 0.02, 0.01)]
    assert 2 < samples[1] / samples[0] < 8  # a quarter of the variance: four times the samples
    assert 2 < samples[2] / samples[1] < 8


def test_an_endless_stream_comes_to_an_end():
    stream = (torch.randn(16, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(i)) for i in itertools.count())
    assert precise_bn(model(), stream, tolerance=0.03).converged


def test_never_fewer_than_eight_batches():
    x = torch.randn(16, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    assert precise_bn(model(), itertools.repeat(x), tolerance=0.5).batches == 8


@pytest.mark.parametrize("limit", [{"num_batches": 12}, {"num_samples": 190}])
def test_another_limit_may_come_first(limit):
    with pytest.warns(UserWarning, match="tolerance=0.001 was not reached") as caught:
        report = precise_bn(model(), loader(640, shuffle=True), tolerance=0.001, **limit)
    assert report.batches == 12
    assert not report.converged
    assert caught[0].filename == __file__


def test_running_out_of_data_is_a_warning_with_the_error_reached():
    with pytest.warns(UserWarning, match=r"640 samples leave an estimated error of 0\.0\d+ \(BN layer '\d'\)"):
        report = precise_bn(model(), loader(640, shuffle=True), tolerance=0.001)
    assert report.samples == 640
    assert 0.001 < report.error < 0.2
    assert "was not reached" in str(report)


def test_few_batches_are_a_warning():
    with pytest.warns(UserWarning, match="only 3 batches"):
        precise_bn(model(), loader(48, shuffle=True), tolerance=10.0)


def test_data_sorted_by_class_is_read_to_the_end_and_a_warning():
    labels = torch.arange(4).repeat_interleave(800)
    data = loader(3200, labels, offsets=labels.float(), shuffle=False)
    with pytest.warns(UserWarning, match="sorted by class"):
        report = precise_bn(model(), data, tolerance=0.1)
    assert report.samples == 3200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shuffled = precise_bn(model(), loader(3200, labels, offsets=labels.float(), shuffle=True), tolerance=0.1)
    assert shuffled.samples < 1600


def test_unlabelled_runs_are_seen_by_the_correlation_of_neighbours():
    offsets = torch.arange(4).repeat_interleave(800).float()
    x = torch.randn(3200, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0)) + offsets.view(-1, 1, 1, 1)
    with pytest.warns(UserWarning, match="resemble each other"):
        report = precise_bn(model(), x.split(16), tolerance=0.005)
    assert report.samples == 3200
    assert report.error > 0.1


def test_stopping_early_in_stored_order_is_a_warning():
    with pytest.warns(UserWarning, match="stored order"):
        report = precise_bn(model(), loader(6400, shuffle=False), tolerance=0.05)
    assert report.converged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precise_bn(model(), loader(6400, torch.arange(6400) % 7, shuffle=False), tolerance=0.05)  # labels tell
