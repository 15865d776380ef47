"""`inspect_bn` against independent oracles, invariances, and planted faults on the embedded backbone."""

import copy
import json
import math

import pytest
import timm
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import bnfinetune as bnf
from bnfinetune.bn.folding.fold import fold_report
from bnfinetune.demo import load_characters
from bnfinetune.diagnose.drift import inspect_bn
from bnfinetune.diagnose.drift_report import BATCH_SIZES
from bnfinetune.diagnose.layer_drift import observing
from bnfinetune.diagnose.recommend import Situation
from bnfinetune.diagnose.report import drift_page
from bnfinetune.errors import StatisticsError
from tests.diagnose.support import FAMILIES, INNER, loader, network

VICTIM = "layer2.0.bn1"


@pytest.fixture(scope="module")
def characters():
    """256 shuffled images that the backbone's statistics come from, in batches of 16."""
    split = load_characters(train=256, validation=1)["train"].with_format("torch")
    images = torch.stack([image.float() for image in split["image"]]) / 255 * 2 - 1
    labels = torch.as_tensor(split["label"][:])
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    return list(zip(images[order].split(16), labels[order].split(16), strict=True))


@pytest.fixture
def backbone():
    return timm.create_model("bnf_resnet", pretrained=True)


# oracles


class One(nn.Module):
    """One BN layer on features."""

    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.bn(x)


def test_distances_are_those_of_gaussians():
    torch.manual_seed(0)
    x = (torch.randn(4096, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, -2.0])).double()
    model = One(3).double()
    model.bn.running_mean.copy_(torch.tensor([0.0, 0.0, -2.0]))
    model.bn.running_var.copy_(torch.tensor([1.0, 1.0, 1.0]))
    layer = inspect_bn(model, [x], images=4096, causes=0).layers["bn"]
    eps = model.bn.eps
    measured = Normal(x.mean(0), (x.var(0, correction=0) + eps).sqrt())
    stored = Normal(model.bn.running_mean, (model.bn.running_var + eps).sqrt())
    expected = kl_divergence(measured, stored) + kl_divergence(stored, measured)
    torch.testing.assert_close(torch.tensor(layer.symmetric_kl).double(), expected)
    shift = (x.mean(0) - model.bn.running_mean) / (1 + eps) ** 0.5
    torch.testing.assert_close(torch.tensor(layer.mean_shift).double(), shift)
    ratio = ((x.var(0, correction=0) + eps) / (1 + eps)).log()
    torch.testing.assert_close(torch.tensor(layer.log_var_ratio).double(), ratio)
    wasserstein = (shift.square() + ((ratio / 2).exp() - 1).square()).mean().sqrt()
    assert layer.drift == pytest.approx(float(wasserstein), rel=1e-3)  # 4096 samples of noise aside


def test_noise_of_gaussian_features_is_known():
    """A mean of B standard normal values has variance 1/B, and their standard deviation about 1/(2B)."""
    torch.manual_seed(0)
    report = inspect_bn(One(64), [torch.randn(2048, 64)], images=2048, causes=0)
    for size, noise in zip(BATCH_SIZES, report.noise, strict=True):
        assert noise == pytest.approx(math.sqrt(1.5 / size), rel=0.05)
    assert report.smallest_sound_batch == 32  # 0.25^2 = 1.5 / 24


def test_noise_of_real_batches_is_what_was_predicted():
    torch.manual_seed(0)
    report = inspect_bn(One(64), list(torch.randn(2048, 64).split(8)), images=2048, causes=0)
    for size, measured in report.batch_noise.items():
        if size >= 16:  # the prediction is to first order in 1/B
            assert measured == pytest.approx(math.sqrt(1.5 / size), rel=0.1)
    assert set(report.batch_noise) == {8, 16, 32, 64, 128, 256, 512}


def test_no_drift_is_found_in_noise_alone():
    torch.manual_seed(0)
    model = One(64)
    model.bn.running_var.fill_(1.0)
    for count in (16, 64, 1024):
        assert inspect_bn(model, [torch.randn(count, 64)], images=count, causes=0).drift < 0.1


def test_rows_of_images_pool_to_the_moments_of_all_values():
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64) * 3 + 1
    layer = nn.BatchNorm2d(4).double().eval()
    with observing({"bn": layer}) as seen:
        layer(x[:2]), layer(x[2:])
    rows = seen.of("bn")
    assert len(rows.counts) == 6
    whole = rows.pooled(6)
    torch.testing.assert_close(whole.means[0], x.mean((0, 2, 3)))
    torch.testing.assert_close(whole.m2s[0] / whole.counts[0], x.var((0, 2, 3), correction=0))


def test_tokens_of_one_image_are_one_row():
    layer = nn.BatchNorm1d(4).eval()
    x = torch.randn(3, 7, 4)
    with observing({"bn": layer}) as seen:
        seen.images = 3
        layer(x.flatten(0, 1))
    torch.testing.assert_close(seen.of("bn").means.float(), x.mean(1))


# invariances


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_as_it_was(name):
    model = network(name)
    model.get_submodule(INNER[name]).eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    data = list(loader(8, batch_size=4, shuffle=False))
    state = torch.random.get_rng_state()
    report = inspect_bn(model, data, causes=1)
    assert report.stages
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy_changes_no_measurement(name):
    data = list(loader(8, batch_size=4, shuffle=False))
    plain = inspect_bn(network(name), data, causes=0)
    frozen = inspect_bn(bnf.freeze_bn(network(name)), data, causes=0)
    for each in plain.layers:
        torch.testing.assert_close(frozen.layers[each].mean_shift, plain.layers[each].mean_shift, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_changes_no_measurement(name):
    """A folded BN layer is handed what its conv has normalised already."""
    data = list(loader(8, batch_size=4, shuffle=False))
    frozen = bnf.freeze_bn(network(name))
    plain = inspect_bn(frozen, data, causes=0)
    folded = inspect_bn(bnf.fold_bn(frozen, torch.zeros(1, 3, 32, 32)), data, causes=0)
    assert fold_report(frozen).folded, "the network is folded again"
    for each in plain.layers:
        torch.testing.assert_close(folded.layers[each].mean_shift, plain.layers[each].mean_shift, rtol=1e-4, atol=1e-4)


def test_how_images_are_batched_does_not_matter(backbone, characters):
    images, labels = (torch.cat(column)[:48] for column in zip(*characters, strict=True))
    one = inspect_bn(backbone, [(images, labels)], causes=0)
    two = inspect_bn(backbone, list(zip(images.split(24), labels.split(24), strict=True)), causes=0)
    for name, layer in one.layers.items():
        torch.testing.assert_close(two.layers[name].mean_shift, layer.mean_shift, rtol=1e-4, atol=1e-5)
    assert two.running == one.running
    assert two.reestimated == one.reestimated
    assert two.batch != one.batch


def test_an_error_half_way_leaves_the_model_as_it_was(backbone, characters):
    before, calls = copy.deepcopy(backbone.state_dict()), []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 10:
            raise RuntimeError("interrupted")

    backbone.train().layer4.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        inspect_bn(backbone, characters)
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


# planted faults


def test_no_drift_on_the_data_that_the_statistics_come_from(backbone, characters):
    report = inspect_bn(backbone, characters)
    assert report.drift < 0.1
    assert report.verdict.startswith("The stored statistics are those of such images")
    assert abs(report.gap) < 0.1
    assert not report.stages


def test_a_planted_shift_is_ranked_first_and_named_as_the_cause(backbone, characters):
    layer = backbone.get_submodule(VICTIM)
    layer.running_mean += 3 * layer.running_var.sqrt()
    report = inspect_bn(backbone, characters)
    assert report.ranked()[0].name == VICTIM
    assert report.ranked()[0].drift == pytest.approx(3, rel=0.05)
    assert report.ranked()[1].drift < 0.1  # the layers after it are not blamed
    assert max(report.stages, key=report.stages.get) == "layer2"
    recovered = {name: each.loss_recovered for name, each in report.layers.items() if each.loss_recovered is not None}
    assert max(recovered, key=recovered.get) == VICTIM
    assert recovered[VICTIM] == pytest.approx(report.gap, rel=0.15)
    assert report.reestimated.accuracy > report.running.accuracy + 0.2
    assert "layer2.0.bn1 is off by 3" in report.verdict


def test_planted_noise_in_one_channel_is_found(backbone, characters):
    layer = backbone.get_submodule(VICTIM)
    layer.running_var[5] *= 16
    report = inspect_bn(backbone, characters)
    assert report.ranked()[0].name == VICTIM
    ratios = report.layers[VICTIM].log_var_ratio
    assert min(range(len(ratios)), key=lambda channel: ratios[channel]) == 5
    assert ratios[5] == pytest.approx(-math.log(16), abs=0.2)


def test_a_planted_dead_channel_is_found(backbone, characters):
    backbone.layer2[0].conv1.weight.data[3] = 0
    backbone.get_submodule(VICTIM).weight.data[4] = 0
    report = inspect_bn(backbone, characters, causes=0)
    assert 3 in report.layers[VICTIM].dead
    assert 4 in report.layers[VICTIM].muted
    assert "dead" in str(report)


def test_stale_statistics_are_found(backbone, characters):
    """Weights that moved on after the statistics were last updated."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.weight += 0.5 * module.weight.std() * torch.randn_like(module.weight)
    stale = inspect_bn(backbone, characters, causes=0)
    bnf.precise_bn(backbone, characters)
    fresh = inspect_bn(backbone, characters, causes=0)
    assert stale.drift > 0.5
    assert stale.drift > 5 * fresh.drift


def test_damaged_statistics_are_named(backbone, characters):
    backbone.get_submodule(VICTIM).running_var[2] = torch.nan
    report = inspect_bn(backbone, characters[:4])
    assert report.layers[VICTIM].damaged == (2,)
    assert report.ranked()[0].name == VICTIM
    assert report.verdict.startswith(f"Damaged: {VICTIM} holds")
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("size", [4, 16])
def test_batches_that_are_no_random_ones_are_found(backbone, characters, size):
    """Sorted by class; by brightness, where labels tell nothing; and shuffled."""
    images, labels = (torch.cat(column) for column in zip(*characters, strict=True))

    def seen(order):
        return inspect_bn(backbone, list(images[order].split(size)), causes=0)

    shuffled, by_class, by_brightness = map(
        seen, (torch.arange(256), labels.argsort(stable=True), images.mean((1, 2, 3)).argsort())
    )
    assert not shuffled.clustered
    assert shuffled.clustering == pytest.approx(1, abs=0.25)
    assert by_class.clustered
    assert by_brightness.clustered
    assert Situation.of(by_class).sorted_batches
    assert "times as much as random ones" in str(by_class)
    assert "Shuffle them" in drift_page(by_class).html()
    assert "Shuffle them" not in drift_page(shuffled).html()


def test_too_few_batches_tell_nothing_of_their_order(backbone, characters):
    report = inspect_bn(backbone, characters[:3], causes=0)
    assert report.clustering is None
    assert not report.clustered


def test_leftover_weight(backbone, characters):
    report = inspect_bn(backbone, characters[:2], steps=10, causes=0)
    assert report.layers[VICTIM].leftover == pytest.approx(0.9**10)


# forms of data


def test_without_labels_distances_stand_for_losses(backbone, characters):
    layer = backbone.get_submodule(VICTIM)
    layer.running_mean += 3 * layer.running_var.sqrt()
    report = inspect_bn(backbone, [{"image": images} for images, _ in characters])
    assert report.running.loss is None
    assert report.gap == report.running.distance > 0.2
    assert max(report.stages, key=report.stages.get) == "layer2"


def test_only_as_many_images_as_asked_for(backbone, characters):
    def endless():
        while True:
            yield from characters

    assert inspect_bn(backbone, endless(), images=40, causes=0).images == 40


@pytest.mark.parametrize("data", [[], [torch.zeros(1, 3, 32, 32)]])
def test_too_little_data_is_an_error(backbone, data):
    with pytest.raises(bnf.errors.StatisticsError, match="2 or more"):
        inspect_bn(backbone, data)


def test_report_survives_json(backbone, characters, tmp_path):
    report = inspect_bn(backbone, characters[:4], causes=0)
    report.save(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["ranked"] == [layer.name for layer in report.ranked()]
    assert read["layers"][VICTIM]["drift"] == pytest.approx(report.layers[VICTIM].drift, rel=1e-4)
    assert read["running"]["accuracy"] == pytest.approx(report.running.accuracy)


class Answers(nn.Module):
    """What libraries' models give: the loss comes first, and the prediction has a name."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        logits = self.net(images)
        return {"loss": logits.square().mean(), "logits": logits}


def test_the_prediction_is_compared_whatever_comes_before_it(backbone, characters):
    report = inspect_bn(backbone, characters[:4], causes=0)
    wrapped = inspect_bn(Answers(backbone), characters[:4], causes=0)
    assert (wrapped.running, wrapped.batch) == (report.running, report.batch)


def test_models_that_are_called_otherwise_say_how(backbone, characters):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone

        def forward(self, images):
            return [{"boxes": each.new_zeros(2, 4), "scores": each.new_zeros(2)} for each in images]

    data = [images for images, _ in characters[:4]]
    with pytest.raises(StatisticsError, match="no tensor with a row for each of .* give forward="):
        inspect_bn(Detector(), data, causes=0)
    found = inspect_bn(Detector(), data, causes=0, forward=lambda net, images: net.backbone(images))
    plain = inspect_bn(backbone, data, causes=0)
    assert (found.running, found.reestimated) == (plain.running, plain.reestimated)


def test_causes_beyond_the_time_are_left_out_and_counted(backbone, characters, monkeypatch):
    backbone.layer2[0].bn1.running_mean += 1  # the fixture is made anew for each test
    whole = inspect_bn(backbone, characters[:4])
    tries = len(whole.stages) + sum(layer.loss_recovered is not None for layer in whole.layers.values())
    assert tries
    assert whole.left_out == 0
    none = inspect_bn(backbone, characters[:4], minutes=0)
    assert (none.stages, none.left_out) == ({}, tries)
    ticks = iter([0.0, *[0.0] * 3, *[100.0] * 99])
    monkeypatch.setattr("bnfinetune.diagnose.drift.time.monotonic", lambda: next(ticks))
    some = inspect_bn(backbone, characters[:4], minutes=1)
    assert len(some.stages) + sum(layer.loss_recovered is not None for layer in some.layers.values()) == 3
    assert some.left_out == tries - 3
    assert some.stages.items() <= whole.stages.items()
