"""Test-time adaptation: AdaBN, mixing and TENT against their definitions in plain PyTorch; TENT's guards one by one."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as tvf
from accelerate import cpu_offload
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score
from timm.layers import BatchNormAct2d
from torch import nn
from torch.distributions import Normal, kl_divergence
from transformers.modeling_outputs import SemanticSegmenterOutput

from bnfinetune.bn import BNPolicy, apply_policy, find_bn_layers, freeze_bn
from bnfinetune.bn.adapt import Tent, adapt_model
from bnfinetune.bn.adapt.certainty import InformationGain, mutual_information, shared_information
from bnfinetune.bn.folding.fold import fold_bn, fold_report
from bnfinetune.bn.statistics.precise import precise_bn
from bnfinetune.errors import PolicyError, SelectionError
from tests.bench.domain_shift import accuracy, characters
from tests.bn.models import backbone, differing, images, tensors_of, toy

CLASSES = 5


def classifier(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A small net that tells its classes apart, evaluated by stored statistics."""
    return nn.Sequential(*toy(norm), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 4, CLASSES)).eval()


def shifted(batch: int = 32, seed: int = 0) -> torch.Tensor:
    return 2 * images(batch, 8, seed) + 1


def test_none_is_the_model_itself():
    model = classifier()
    assert adapt_model(model, "none") is model


@pytest.mark.parametrize("method", ["adabn", "mix", "ema", "tent"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_the_model_itself_stays_as_it_is(method, norm):
    model = classifier(norm)
    before, classes = tensors_of(model), [type(module) for module in model.modules()]
    data = [(shifted(seed=seed), torch.zeros(32)) for seed in range(3)]
    adapted = adapt_model(model, method, data)
    for batch, _ in data:
        adapted(batch)
    assert not differing(tensors_of(model), before)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in adapted.modules())


def test_adabn_is_a_pass_of_precise_bn_over_the_target_data():
    model = classifier()
    freeze_bn(model, layers="1")
    data = [shifted(seed=seed) for seed in range(3)]
    adapted, expected = adapt_model(model, "adabn", data, num_samples=40, prior=0), copy.deepcopy(model)
    precise_bn(expected, data, num_samples=40, include_frozen=True)
    assert torch.equal(adapted(data[0]), expected(data[0]))
    assert not torch.allclose(adapted(data[0]), model(data[0]))


@pytest.mark.parametrize("damage", [0.3, 1.0])
def test_adabn_goes_as_far_as_predictions_gain(damage):
    """Dark characters, which ruin the source's statistics, and characters as the network knows them."""
    model = timm.create_model("bnf_resnet", pretrained=True).eval()
    config = model.pretrained_cfg
    target, held_out, labels = (part[:384] for part in characters(384, 980, 0))
    target, held_out = (tvf.normalize(damage * part, config["mean"], config["std"]) for part in (target, held_out))
    adapted = adapt_model(model, "adabn", iter(target.split(128)))
    source, found = accuracy(model, held_out, labels), accuracy(adapted, held_out, labels)
    full = accuracy(adapt_model(model, "adabn", target.split(128), prior=0), held_out, labels)
    assert found > max(source, full) - 2, (source, found, full)
    assert (source < 50) == (damage < 1)


def test_adabn_by_choice_needs_logits_and_takes_those_of_many_labels_and_pixels():
    data = [shifted(seed=seed) for seed in range(2)]
    dense = toy().eval()
    assert adapt_model(dense, "adabn", data)(data[0]).shape == (32, 6, 4, 4)
    with pytest.raises(PolicyError, match="prior=0"):
        adapt_model(nn.Sequential(*toy(), nn.Flatten(0)).eval(), "adabn", data)


@pytest.mark.parametrize("several", [False, True])
def test_adabn_by_choice_judges_as_many_labels_as_there_are(several, monkeypatch):
    asked = []
    judge = InformationGain.__call__
    monkeypatch.setattr(InformationGain, "__call__", lambda self, x: asked.append(self.several) or judge(self, x))
    adapt_model(classifier(), "adabn", [shifted()], several=several)
    assert set(asked) == {several}


@pytest.mark.parametrize("several", [False, True])
def test_mutual_information_equals_scipys_entropies(several):
    logits = 3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(5)
    found = mutual_information(logits, several=several)
    if several:
        p = logits.double().sigmoid().numpy()
        pairs = np.stack([p, 1 - p], -1)
        expected = (entropy(pairs.mean(0), axis=-1) - entropy(pairs, axis=-1).mean(0)).mean()
    else:
        p = logits.double().softmax(1).numpy()
        expected = entropy(p.mean(0)) - entropy(p, axis=1).mean()
    assert found == pytest.approx(expected, rel=1e-5)


def test_information_must_not_come_from_other_predictions_than_the_first():
    """Surer ones of the same classes score higher, surer ones of other classes never do, lost ones may be anything."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, 5, generator=generator)
    for several in (False, True):
        score = InformationGain(several=several)
        assert score(logits) == pytest.approx(mutual_information(logits, several=several))
        assert score(2 * logits) == pytest.approx(mutual_information(2 * logits, several=several))
        assert score(2 * logits) > score(logits)
        assert score(5 * logits[torch.randperm(200, generator=generator)]) == -math.inf
    lost = InformationGain()
    lost(torch.zeros(200, 5))
    assert lost(logits) > 0
    dense = InformationGain()
    assert dense(logits.view(50, 4, 5).transpose(1, 2)[..., None]) == pytest.approx(
        mutual_information(logits), rel=1e-5
    )


def test_information_that_predictions_share_equals_sklearns():
    one, other = torch.randint(0, 4, (2, 300), generator=torch.Generator().manual_seed(0))
    other = torch.where(torch.arange(300) % 2 == 0, one, other)
    hard = [200.0 * torch.nn.functional.one_hot(labels) for labels in (one, other)]
    assert shared_information(*hard) == pytest.approx(mutual_info_score(one, other), rel=1e-5)


def test_mixing_weighs_stored_statistics_as_so_many_samples():
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(9.0)
    x = shifted(8)
    batch_mean, batch_var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    mean, var = (24 * 2.0 + 8 * batch_mean) / 32, (24 * 9.0 + 8 * batch_var) / 32
    expected = (x - mean.view(1, -1, 1, 1)) / (var + norm.eps).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(adapt_model(nn.Sequential(norm), "mix", mix_prior=24.0)(x), expected)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("batch", [1, 6, 200])
def test_a_stream_is_followed_layer_by_layer_as_the_paper_has_it(norm, batch):
    model = toy(norm).eval().double()
    adapted, momentum = adapt_model(model, "ema"), {1: 0.01, 6: 0.01, 200: 1.0}[batch]
    layers = [model[1], model[4]]
    stored = [(layer.running_mean, layer.running_var) for layer in layers]
    averages, weights = list(stored), [0.25, 0.25]
    for seed in range(3):
        x = found = shifted(batch, seed).double()
        for number, layer in enumerate(layers):
            x = model[0](x) if number == 0 else model[3](model[2](x))
            v_b, m_b = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            m_e, v_e = averages[number]
            m_e, v_e = (1 - momentum) * m_e + momentum * m_b, (1 - momentum) * v_e + momentum * v_b
            averages[number] = m_e, v_e
            (m_s, v_s), w = stored[number], weights[number]
            mean = (1 - w) * m_e + w * m_s
            var = (1 - w) * (v_e + m_e**2) + w * (v_s + m_s**2) - mean**2
            x = (x - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
            x = x * layer.weight[:, None, None] + layer.bias[:, None, None]
            x = x.relu() if isinstance(layer, BatchNormAct2d) else x
        torch.testing.assert_close(adapted(found), x)
        apart = []
        for layer, (m_s, v_s), (m_e, v_e) in zip(layers, stored, averages, strict=True):
            one, other = (Normal(m, (v + layer.eps).sqrt()) for m, v in ((m_s, v_s), (m_e, v_e)))
            apart.append((kl_divergence(one, other) + kl_divergence(other, one)).mean())
        z = (torch.stack(apart) - torch.stack(apart).mean()) / torch.stack(apart).std(correction=0)
        weights = ((z.clip(-1, 1) + 1) / 4).tolist()
        assert list(adapted.source_weights.values()) == pytest.approx(weights)
    assert adapted.batches == 3
    assert not adapted.train().training


def test_an_empty_batch_and_a_model_without_statistics():
    adapted = adapt_model(toy(), "ema")
    assert adapted(torch.zeros(0, 3, 8, 8)).shape[0] == 0
    with pytest.raises(PolicyError, match="no BN layer has any"):
        adapt_model(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "ema")


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_tent_equals_plain_pytorch_step_by_step(norm):
    model = classifier(norm)
    tent, plain = adapt_model(model, "tent", lr=0.01), copy.deepcopy(model)
    layers = [layer.train() for layer in find_bn_layers(plain).values()]
    optimizer = torch.optim.Adam([p for layer in layers for p in (layer.weight, layer.bias)], lr=0.01)
    for seed in range(4):
        x = shifted(seed=seed)
        logits = plain(x)
        with torch.inference_mode():  # as evaluation loops run it
            predicted = tent(x + 0)
        torch.testing.assert_close(predicted, logits)
        assert not predicted.requires_grad
        optimizer.zero_grad()
        torch.distributions.Categorical(logits=logits).entropy().mean().backward()
        optimizer.step()
    assert tent.steps == 4
    for ours, theirs in zip(find_bn_layers(tent.network).values(), layers, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight)
        torch.testing.assert_close(ours.bias, theirs.bias)
    source, adapted = tensors_of(model), tensors_of(tent.network)
    assert {key.split(".")[0] for key in differing(source, adapted)} == {"1", "4"}
    assert not [key for key in differing(source, adapted) if "running" in key or "tracked" in key]


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_tent_lowers_the_entropy_of_real_families(name):
    tent, x = Tent(backbone(name), lr=1e-2), images(16, 32)
    entropies = [torch.distributions.Categorical(logits=tent(x)).entropy().mean() for _ in range(4)]
    assert entropies[-1] < entropies[0]


def test_small_batches_are_predicted_by_mixing_without_a_step():
    model = classifier()
    tent = Tent(model, min_batch=8, mix_prior=4.0)
    affine = tensors_of(tent.network)
    mixed = adapt_model(model, "mix", mix_prior=4.0)
    assert torch.equal(tent(shifted(7)), mixed(shifted(7)))
    assert (tent.steps, tent.small_batches) == (0, 1)
    assert not differing(tensors_of(tent.network), affine)
    tent(shifted(8))
    assert tent.steps == 1


def test_a_collapse_is_seen_and_undone():
    """Steps far too large drive every prediction into one class, unless they are watched."""

    def classes_at_the_end(tent: Tent) -> int:
        for seed in range(60):
            predicted = tent(shifted(64, seed)).argmax(1)
        return len(predicted.unique())

    model = classifier()
    assert classes_at_the_end(Tent(model, lr=1.0, collapse=1e-6)) == 1  # the danger is real
    guarded = Tent(model, lr=1.0)
    assert classes_at_the_end(guarded) >= 3
    assert guarded.resets == 2


def test_after_too_many_resets_it_gives_up():
    model = classifier()
    tent = Tent(model, lr=1.0, collapse=0.95, max_resets=1)
    for seed in range(60):
        tent(shifted(64, seed))
    assert tent.resets == 2
    assert tent.exhausted
    source = Tent(model, max_steps=0)
    assert torch.equal(tent(shifted(64)), source(shifted(64)))  # the source's weights and biases


def test_gentle_steps_do_not_count_as_collapse():
    tent = Tent(classifier(), lr=1e-3)
    for seed in range(40):
        tent(shifted(64, seed))
    assert (tent.steps, tent.resets) == (40, 0)


def test_an_entropy_that_is_not_finite_goes_back_to_the_source():
    tent = Tent(classifier())
    tent(shifted())
    broken = shifted()
    broken[0] = float("nan")
    tent(broken)
    assert tent.resets == 1
    assert tent(shifted()).isfinite().all()


@pytest.mark.parametrize("passes", [1, 3])
def test_at_most_the_passes_asked_for(passes):
    data = [shifted(seed=seed) for seed in range(4)]
    tent = adapt_model(classifier(), "tent", data, passes=passes)
    assert tent.steps == 4 * (passes - 1)
    for _ in range(3):
        for batch in data:
            tent(batch)
    assert tent.steps == 4 * passes
    assert tent.exhausted


def test_folded_and_frozen_models_adapt_too():
    model = fold_bn(freeze_bn(classifier()), shifted())
    tent = Tent(model)
    assert not fold_report(tent.network).folded
    assert fold_report(model).folded
    tent(shifted())
    assert differing(tensors_of(tent.network), tensors_of(model))


def test_an_evaluation_policy_of_the_model_is_overridden_in_the_copy_only():
    model = apply_policy(classifier(), BNPolicy(eval_stats="batch"))
    adapted = adapt_model(model, "adabn", [shifted()])
    assert torch.equal(adapted(shifted()), adapt_model(classifier(), "adabn", [shifted()])(shifted()))


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: adapt_model(classifier(), "tend"), PolicyError, "none, adabn, mix, ema, tent"),
        (lambda: adapt_model(classifier(), "adabn"), PolicyError, "pass data="),
        (lambda: adapt_model(classifier(), "tent", passes=2), PolicyError, "pass data="),
        (lambda: adapt_model(classifier(), "tent", [], passes=0), PolicyError, "passes=0"),
        (lambda: Tent(classifier(), lr=0), PolicyError, "lr=0"),
        (lambda: Tent(classifier(), min_batch=1), PolicyError, "min_batch=1"),
        (lambda: Tent(nn.Sequential(nn.BatchNorm2d(3, affine=False))), PolicyError, "affine=False"),
        (lambda: Tent(nn.Sequential(nn.Linear(3, 3))), SelectionError, "no BatchNorm"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_remedy(run, error, message):
    with pytest.raises(error, match=message):
        run()


# --- what models give


class Segmenter(nn.Module):
    """Dense logits (N, classes, H, W), in the form that is asked for."""

    def __init__(self, form: str = "tensor", classes: int = CLASSES, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.body, self.head, self.form = toy(norm), nn.Conv2d(6, classes, 1), form

    def forward(self, x):
        dense = self.head(self.body(x).relu())
        if self.form == "one vector each":
            dense = dense.mean((2, 3))
        return {
            "tuple": (dense, dense + 1),
            "torchvision": OrderedDict(out=dense, aux=dense + 1),
            "transformers": SemanticSegmenterOutput(logits=dense),
            "boxes": [{"boxes": torch.zeros(len(dense), 4)}] * len(dense),
            "nothing": None,
            "flat": dense.flatten(),
        }.get(self.form, dense)


def dense_of(output) -> torch.Tensor:
    if isinstance(output, tuple | list):
        return output[0]
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("form", ["tensor", "tuple", "torchvision", "transformers", "one vector each"])
def test_a_step_on_dense_predictions_is_one_on_the_mean_entropy_of_pixels(form, norm):
    model, x = Segmenter(form, norm=norm).eval(), shifted()
    tent = Tent(model, lr=1e-2)
    output = tent(x)
    twin = copy.deepcopy(model)
    affine = [p for layer in find_bn_layers(twin).values() for p in (layer.weight, layer.bias)]
    for layer in find_bn_layers(twin).values():
        layer.train()
    optimizer = torch.optim.Adam(affine, lr=1e-2)
    wanted = dense_of(twin(x))
    p = wanted.softmax(1)
    (-(p * p.log()).sum(1).mean()).backward()
    optimizer.step()
    assert type(output) is type(model(x))
    assert not dense_of(output).requires_grad
    torch.testing.assert_close(dense_of(output), wanted.detach())
    adapted = [p for layer in find_bn_layers(tent.network).values() for p in (layer.weight, layer.bias)]
    torch.testing.assert_close([p.detach() for p in adapted], [p.detach() for p in affine], rtol=1e-5, atol=1e-6)
    small = tent(shifted(4))
    assert type(small) is type(output)
    assert not dense_of(small).requires_grad


@pytest.mark.parametrize(("form", "classes"), [("boxes", 5), ("nothing", 5), ("flat", 5), ("tensor", 1)])
def test_outputs_without_logits_are_refused_by_name(form, classes):
    with pytest.raises(PolicyError, match=r"TENT needs logits \(N, classes\) or \(N, classes, H, W\)"):
        Tent(Segmenter(form, classes).eval())(shifted())


def test_inputs_may_come_by_keyword():
    by_name, by_position = (Tent(classifier_by_name()) for _ in range(2))
    assert by_name(pixel_values=shifted()).equal(by_position(shifted()))
    assert by_name.steps == 1


def classifier_by_name() -> nn.Module:
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = classifier()

        def forward(self, pixel_values):
            return self.net(pixel_values)

    return Named().eval()


@pytest.mark.parametrize("method", ["adabn", "mix", "tent"])
def test_nothing_is_made_on_the_default_device(method):
    data, small, found = [shifted(seed=seed) for seed in range(2)], shifted(3), []
    for device in (None, "meta"):
        torch.manual_seed(0)
        model = classifier()
        torch.set_default_device(device)
        try:
            adapted = adapt_model(model, method, data, passes=2)
            found.append([adapted(batch) for batch in (*data, small)])
        finally:
            torch.set_default_device(None)
    torch.testing.assert_close(*found)


def test_offloaded_models_are_adapted_where_that_needs_no_gradient():
    data, x = [shifted(seed=seed) for seed in range(2)], shifted(4)
    plain = classifier()
    offloaded = cpu_offload(copy.deepcopy(plain), execution_device="cpu")
    with pytest.raises(PolicyError, match="offloaded"):
        adapt_model(offloaded, "tent")
    torch.testing.assert_close(adapt_model(offloaded, "adabn", data)(x), adapt_model(plain, "adabn", data)(x))
