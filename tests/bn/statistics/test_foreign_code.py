"""precise_bn, update_bn_stats and inspect_bn on models that other code has changed, against what a plain model gives.

Where other code makes a measurement impossible, it is refused by name and nothing moves.
"""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torchvision
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrizations, prune

from bnfinetune.bn import BNPolicy, apply_policy, find_bn_layers, precise_bn, update_bn_stats
from bnfinetune.bn.population import STATS
from bnfinetune.bn.statistics.ranks import merge_running_stats
from bnfinetune.diagnose.drift import inspect_bn
from bnfinetune.errors import LayerError, StatisticsError
from tests.bn.models import backbone, differing, images, tensors_of, toy

NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def precise(model, data):
    precise_bn(model, data)


def updated(model, data):
    update_bn_stats(model, data, len(data))


def inspected(model, data) -> dict[str, float]:
    report = inspect_bn(model, data, causes=1)
    return {name: layer.drift for name, layer in report.layers.items()} | {"": report.running.distance}


MEASURES = {"precise_bn": precise, "update_bn_stats": updated, "inspect_bn": inspected}


def batches() -> list[torch.Tensor]:
    return [images(n, 12, seed) * (1 + seed) + seed for seed, n in enumerate((8, 5, 6))]


def statistics_of(model: nn.Module) -> list[torch.Tensor]:
    return [layer.get_buffer(key).clone() for layer in find_bn_layers(model).values() for key in STATS]


def assert_measures_alike(measure: str, changed: nn.Module, plain: nn.Module) -> None:
    found, wanted = (MEASURES[measure](model, batches()) for model in (changed.train(), plain.train()))
    if wanted is not None:
        assert found == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(statistics_of(changed), statistics_of(plain), rtol=1e-6, atol=1e-7)


class ByName(nn.Module):
    """Calls its layers by keyword: convolutions and plain BN with `input=`, timm's fused BN with `x=`."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        for module in self.inner:
            x = module(x=x) if isinstance(module, BatchNormAct2d) else module(input=x)
        return x


class PlusOne(ModelHook):
    """An accelerate hook that changes what the layer gets."""

    def pre_forward(self, module, x):
        return (x + 1,), {}


class Shifted(nn.Module):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("measure", MEASURES)
def test_layers_called_by_keyword(measure, norm):
    changed = ByName(toy(norm))
    assert_measures_alike(measure, changed, toy_named(norm))


def toy_named(norm) -> nn.Module:
    """The same layers, called by position, under the same names."""

    class ByPosition(ByName):
        def forward(self, x):
            return self.inner(x)

    return ByPosition(toy(norm))


def test_a_layer_under_another_evaluation_rule_is_called_by_keyword():
    changed, plain = ByName(toy()), toy_named(nn.BatchNorm2d)
    for model in (changed, plain):
        model.inner[1].eps = 1e-2
        apply_policy(model, BNPolicy(eval_stats="batch", layers="inner.1"))
    names = {"layers": "inner.4"}
    precise_bn(plain, batches(), **names)
    precise_bn(changed, batches(), **names)
    torch.testing.assert_close(statistics_of(changed), statistics_of(plain))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_layer_whose_forward_was_replaced_is_refused_by_name(measure, norm):
    model = toy(norm).train()
    before = tensors_of(model)
    own = model[4].forward = lambda x: x
    with pytest.raises(LayerError, match=r"BN layer '4' has a forward of its own"):
        MEASURES[measure](model, batches())
    assert model[4].forward is own
    assert not differing(before, tensors_of(model))
    model[4].forward = types.MethodType(norm.forward, model[4])  # its own one, bound anew, replaces nothing
    assert_measures_alike(measure, model, toy(norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("measure", ["precise_bn", "update_bn_stats"])
def test_hooks_of_accelerate_on_a_layer_go_on_working(measure, norm):
    changed, plain = toy(norm), toy(norm)
    add_hook_to_module(changed[4], PlusOne())
    plain.insert(4, Shifted())
    assert_measures_alike(measure, changed, plain)
    x = images(4, 12)
    torch.testing.assert_close(changed.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
@pytest.mark.parametrize("measure", ["precise_bn", "update_bn_stats"])
def test_offloaded_weights(measure, name):
    plain = backbone(name)
    changed = cpu_offload(copy.deepcopy(plain), execution_device="cpu")
    assert changed.conv1.weight.device.type == "meta" if name == "resnet18" else True
    data = [images(4, 32, seed) + seed for seed in range(2)]
    for model in (changed.train(), plain.train()):
        MEASURES[measure](model, data)
    torch.testing.assert_close(statistics_of(changed), statistics_of(plain))
    torch.testing.assert_close(changed.eval()(data[0]), plain.eval()(data[0]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("measure", MEASURES)
def test_offloaded_statistics_are_refused_by_name(measure, norm):
    changed = cpu_offload(toy(norm).train(), execution_device="cpu", offload_buffers=True)
    with pytest.raises(StatisticsError, match=r"BN layer '1' has its running_mean on the meta device"):
        MEASURES[measure](changed, batches())
    changed.eval()(batches()[0])  # still works


def test_offloaded_affine_is_refused_where_it_is_read():
    changed = cpu_offload(toy().train(), execution_device="cpu")
    with pytest.raises(StatisticsError, match=r"BN layer '1' has its weight on the meta device"):
        inspect_bn(changed, batches())


def test_a_failure_under_offloading_is_the_failure_itself():
    changed = cpu_offload(nn.Sequential(toy(), nn.BatchNorm2d(6)), execution_device="cpu")
    changed[0][0].register_buffer("extra", torch.zeros(1, device="meta"))
    with pytest.raises(StatisticsError, match="NaN or infinite"):
        precise_bn(changed, [images(4, 12) * torch.nan])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("measure", MEASURES)
def test_pruned_and_parametrized_layers(measure, norm):
    changed, plain = toy(norm), toy(norm)
    prune.l1_unstructured(changed[4], "weight", 0.5)
    with torch.no_grad():
        plain[4].weight.mul_(changed[4].weight_mask)
    parametrizations.weight_norm(changed[3])
    assert_measures_alike(measure, changed, plain)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("measure", MEASURES)
def test_half_precision_models(measure, norm):
    changed, wide = toy(norm).bfloat16(), toy(norm).bfloat16().double()
    data = [batch.bfloat16() for batch in batches()]
    found = MEASURES[measure](changed.train(), data)
    wanted = MEASURES[measure](wide.train(), [batch.double() for batch in data])
    if wanted is not None:
        assert found == pytest.approx(wanted, rel=0.05, abs=0.02)
    for got, want in zip(statistics_of(changed), statistics_of(wide), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("measure", [*MEASURES, "precise_bn ema", "precise_bn mean", "merge_running_stats"])
def test_nothing_is_made_on_the_default_device(measure, norm):
    calls = {
        **MEASURES,
        "precise_bn ema": lambda model, data: precise_bn(model, data, variance="ema"),
        "precise_bn mean": lambda model, data: precise_bn(model, data, variance="mean", tolerance=10.0),
        "merge_running_stats": lambda model, data: merge_running_stats(model, 5) and None,
    }
    changed, plain, data = toy(norm).train(), toy(norm).train(), batches()
    wanted = calls[measure](plain, data)
    torch.set_default_device("meta")
    try:
        found = calls[measure](changed, data)
    finally:
        torch.set_default_device(None)
    if isinstance(wanted, dict):
        assert found == wanted
    assert not differing(tensors_of(changed), tensors_of(plain))


@pytest.mark.parametrize("rule", ["batch", "running", "ghost", "renorm", "stochastic"])
@pytest.mark.parametrize("norm", NORMS)
def test_no_rule_takes_the_default_device(norm, rule):
    schedule = {"renorm_warmup": 2, "renorm_ramp": 2} if rule == "renorm" else {}
    size = {"ghost_size": 4} if rule == "ghost" else {}
    model, x = toy(norm), batches()[0]
    torch.set_default_device("meta")
    try:
        apply_policy(model, BNPolicy(train_stats=rule, update_stats="cumulative", domains="b", **schedule, **size))
        y = model.train()(x)
        y.sum().backward()
    finally:
        torch.set_default_device(None)
    assert y.isfinite().all()
    assert all(buffer.device.type == "cpu" and buffer.isfinite().all() for buffer in model.buffers())


class DetectorBackbone(nn.Module):
    """Takes a list of images of any size, as torchvision's detectors do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, samples):
        return [self.inner(sample[None]) for sample in samples]


def detection_batches() -> list[tuple[list[torch.Tensor], list[dict]]]:
    sizes = ((9, 12), (14, 10), (11, 9))
    samples = [images(1, 16, seed)[0, :, :h, :w] + seed for seed, (h, w) in enumerate(sizes)]
    return [(samples[:2], [{"boxes": torch.zeros(1, 4)}] * 2), (samples[2:], [{"boxes": torch.zeros(3, 4)}])]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("collate", [list, tuple])
def test_detection_batches_count_images(collate, norm):
    data = [(collate(samples), collate(targets)) for samples, targets in detection_batches()]
    changed, plain = DetectorBackbone(toy(norm)), DetectorBackbone(toy(norm))
    report = precise_bn(changed, data, num_samples=3)
    assert (report.samples, report.batches) == (3, 2)
    precise_bn(plain, data, num_samples=1)  # one whole image, with all its channels
    twin = DetectorBackbone(toy(norm))
    assert precise_bn(twin, [data[0][0][0][None]]).samples == 1
    torch.testing.assert_close(statistics_of(plain), statistics_of(twin))
    inner = toy(norm)
    precise_bn(inner, [sample[None] for samples, _ in data for sample in samples])
    torch.testing.assert_close(statistics_of(changed)[:2], statistics_of(inner)[:2])


def test_a_torchvision_detector_takes_its_batches_as_they_come():
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    data = [([images(1, 64)[0], images(1, 48)[0]], [{"labels": torch.ones(1)}] * 2)] * 2
    assert precise_bn(model, data, num_samples=3).samples == 3
    with pytest.raises(StatisticsError, match=r"inspect_bn needs .* list of 2 samples"):
        inspect_bn(model, data)
