"""Statistics held back by those that the model had: against pooled data, the limits of a prior, and its search."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from bnfinetune.bn import find_bn_layers
from bnfinetune.bn.statistics.precise import precise_bn
from bnfinetune.bn.statistics.prior_search import choose_prior
from bnfinetune.errors import StatisticsError
from tests.bn.models import BACKBONES, backbone, differing, images, tensors_of

NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def batches_of(*sizes: int) -> list[torch.Tensor]:
    return [images(n, 32, seed) * (1 + seed) + seed for seed, n in enumerate(sizes)]


@pytest.mark.parametrize("norm", NORMS)
def test_a_prior_of_n_samples_equals_data_that_holds_these_samples_too(norm):
    known, data = batches_of(6, 3), batches_of(4, 1, 7)
    model = nn.Sequential(norm(3))
    precise_bn(model, known)
    report = precise_bn(model, data, prior=9)
    together = torch.cat([*known, *data]).double().transpose(0, 1).flatten(1)
    assert torch.allclose(model[0].running_mean.double(), together.mean(1), rtol=1e-6)
    assert torch.allclose(model[0].running_var.double(), together.var(1, unbiased=False), rtol=1e-6)
    assert report.share == pytest.approx(12 / 21)
    assert report.to_dict()["share"] == report.share
    assert "weigh 0.57 beside the stored" in str(report)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("variance", ["pooled", "mean"])
def test_zero_takes_the_data_infinity_keeps_the_model_and_between_is_the_mixture(name, variance):
    model, batches = backbone(name), batches_of(8, 5)
    kept, taken, mixed = (copy.deepcopy(model) for _ in range(3))
    precise_bn(taken, batches, variance=variance)
    precise_bn(mixed, batches, variance=variance, prior=13 / 3)  # a quarter stored
    precise_bn(kept, batches, variance=variance, prior=math.inf)
    precise_bn(again := copy.deepcopy(model), batches, variance=variance, prior=0)
    assert not differing(tensors_of(kept), tensors_of(model))
    assert not differing(tensors_of(again), tensors_of(taken))
    layers = [find_bn_layers(each) for each in (model, taken, mixed)]
    for key, layer in layers[0].items():
        m_s, v_s = layer.running_mean.double(), layer.running_var.double()
        m_t, v_t = layers[1][key].running_mean.double(), layers[1][key].running_var.double()
        second = 0.25 * (v_s + m_s**2) + 0.75 * (v_t + m_t**2)
        mean = 0.25 * m_s + 0.75 * m_t
        assert torch.allclose(layers[2][key].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        assert torch.allclose(layers[2][key].running_var.double(), second - mean**2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_channel_that_is_nearly_constant_is_named_and_a_prior_bounds_what_it_amplifies(norm):
    x = images(16, 32, 0)
    x[:, 1] *= 1e-3
    bare, held = nn.Sequential(norm(3)), nn.Sequential(norm(3))
    report = precise_bn(bare, [x])
    assert report.layers["0"].collapsed == (1,)
    assert "nearly constant on the data: 1 channels of 0 (1)" in str(report)
    assert bare[0].running_var[1] < 1e-5
    assert precise_bn(held, [x], prior=16).layers["0"].collapsed == (1,)
    assert (held[0].running_var >= 0.5).all()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("training", [True, False])
def test_through_the_mixture_each_layer_sees_what_those_before_it_will_put_out(name, training):
    """One batch: what is written normalises it exactly as the pass did, so the outputs of both are the same."""
    model, batch = backbone(name).train(training), images(9, 32, 1) * 2 + 1
    stored, seen = copy.deepcopy(model), []
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output))
    precise_bn(model, [batch], prior=3, through="mixture")
    hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(batch), seen[0], rtol=1e-3, atol=1e-4)
    inputs = inputs_of_layers_in_evaluation(model, batch)
    old = find_bn_layers(stored)
    for key, layer in find_bn_layers(model).items():
        x, m_s, v_s = inputs[key], old[key].running_mean.double(), old[key].running_var.double()
        m_t, v_t = x.mean(1), x.var(1, unbiased=False)
        mean = 0.25 * m_s + 0.75 * m_t
        var = 0.25 * (v_s + m_s**2) + 0.75 * (v_t + m_t**2) - mean**2
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-3, atol=1e-4)


def inputs_of_layers_in_evaluation(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of BN layers as (C, values) in float64."""
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, key=key: inputs.update({key: args[0].transpose(0, 1).flatten(1).double()})
        )
        for key, layer in find_bn_layers(model).items()
    ]
    with torch.no_grad():
        model.eval()(batch)
    for hook in hooks:
        hook.remove()
    return inputs


class Wanted:
    """Scores a model by how near its first variance is to a target."""

    def __init__(self, model: nn.Module, value: float) -> None:
        self.model, self.value = model, value
        self.modes: list[bool] = []

    def __call__(self) -> float:
        layer = next(iter(find_bn_layers(self.model).values()))
        self.modes.append(layer.training)
        return -abs(layer.running_var[0].item() - self.value)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_search_ends_as_the_pass_that_scores_best(name, share):
    model, batches = backbone(name).train(), batches_of(8, 5)
    expected = copy.deepcopy(model)
    prior = 13 * (1 - share) / share if share else math.inf
    precise_bn(expected, batches, prior=prior, through="mixture")
    score = Wanted(model, next(iter(find_bn_layers(expected).values())).running_var[0].item())
    choice = choose_prior(model, batches, score, shares=(1.0, 0.5))
    assert not differing(tensors_of(model), tensors_of(expected))
    assert (choice.share, choice.prior, choice.report.share) == (share, prior, share)
    assert list(choice.scores) == [0.0, 0.5, 1.0]
    assert score.modes == [False] * 3
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("scores", "tried"),
    [
        ({0.0: 3, 0.4: 2, 0.8: 1, 0.1: 2, 0.2: 9}, (0.0, 0.4, 0.8, 0.1)),
        ({0.0: 1, 0.4: 1, 0.8: 2, 0.6: 1, 0.2: 9}, (0.0, 0.4, 0.8, 0.6)),
        ({0.0: 1, 0.4: 2, 0.8: 1, 0.2: 3, 0.1: 2}, (0.0, 0.4, 0.8, 0.2, 0.1)),
        ({0.0: 1, 0.4: 2, 0.8: 1, 0.2: 1, 0.6: 4}, (0.0, 0.4, 0.8, 0.2, 0.6)),
    ],
)
def test_a_search_tries_ends_and_middle_then_beside_the_best(scores, tried):
    model, batches, asked = backbone("resnet18"), batches_of(8), []
    shares = (0.1, 0.2, 0.4, 0.6, 0.8)
    stored = tensors_of(model)
    series = iter(scores[share] for share in tried)
    choice = choose_prior(model, batches, lambda: next(series), shares=shares)
    assert tuple(choice.scores) == tried
    best = max(choice.scores, key=lambda share: choice.scores[share])
    assert (choice.share, choice.report.share) == (best, best)
    assert bool(differing(tensors_of(model), stored)) == (best > 0)
    choose_prior(model, batches, lambda: asked.append(1) or 0.0, shares=shares, every=True)
    assert len(asked) == 6


def test_of_equal_scores_the_stored_statistics_win_and_a_failing_score_leaves_the_model():
    model, batches = backbone("resnet18"), batches_of(8)
    before = tensors_of(model)
    assert choose_prior(model, batches, lambda: 1.0).share == 0
    assert not differing(tensors_of(model), before)
    for score, error in ((lambda: math.nan, StatisticsError), (lambda: 1 / 0, ZeroDivisionError)):
        with pytest.raises(error):
            choose_prior(model, batches, score)
        assert not differing(tensors_of(model), before)
    late = iter([0.0, 1.0, math.nan])  # when the statistics have moved already
    with pytest.raises(StatisticsError, match="not a number"):
        choose_prior(model, batches, lambda: next(late))
    assert not differing(tensors_of(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": -1}, "prior=-1"),
        ({"prior": math.nan}, "prior=nan"),
        ({"prior": 4, "variance": "ema"}, "prior has no meaning"),
        ({"prior": 4, "through": "data"}, "batch, mixture"),
        ({"prior": 4, "forward": lambda net, batch: net(batch.x)}, "counts samples"),
    ],
)
def test_what_is_no_prior_is_refused_and_the_model_stays(options, message):
    model = backbone("resnet18")
    before = tensors_of(model)
    data = [SimpleNamespace(x=images(4, 32, 0))] if "forward" in options else batches_of(4)
    with pytest.raises(StatisticsError, match=message):
        precise_bn(model, data, **options)
    assert not differing(tensors_of(model), before)


def test_a_search_refuses_what_it_cannot_weigh_or_read_again():
    model = backbone("resnet18")
    for shares in ((), (1.5,), (0.0, 0.5)):
        with pytest.raises(StatisticsError, match="shares="):
            choose_prior(model, batches_of(4), lambda: 0.0, shares=shares)
    with pytest.raises(StatisticsError, match="only once"):
        choose_prior(model, iter(batches_of(4)), lambda: 0.0)
    with pytest.raises(StatisticsError, match="num_samples="):
        precise_bn(model, iter(batches_of(4)), prior=1, through="mixture")
