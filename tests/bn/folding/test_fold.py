"""Folded models compute, learn and keep their promises as unfolded ones do, and keep no more for backward."""

import contextlib
import copy
import json
import pickle
import warnings

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from bnfinetune.bn import (
    BNPolicy,
    apply_policy,
    domain,
    find_bn_layers,
    freeze_bn,
    no_stat_updates,
    restore_bn,
    unfreeze_bn,
)
from bnfinetune.bn.folding import arithmetic
from bnfinetune.bn.folding import fold as folding
from bnfinetune.bn.folding.arithmetic import fold_parameters
from bnfinetune.bn.folding.fold import fold_bn, fold_report, unfold_bn, unfolded
from bnfinetune.errors import BnFinetuneError, PolicyError, SelectionError
from tests.bn.folding.outcomes import bytes_kept, outcome, relative_error, without_norm
from tests.bn.models import BACKBONES, backbone, images, randomise, tensors_of, toy

EXAMPLE = images(1)


def frozen(name: str, *, affine: bool = False) -> nn.Module:
    return freeze_bn(backbone(name), affine=affine)


def folded(name: str, *, affine: bool = False) -> nn.Module:
    return fold_bn(frozen(name, affine=affine), EXAMPLE)


def folded_toy(norm: type[nn.Module] | None = None, *, affine: bool = False) -> nn.Module:
    return fold_bn(freeze_bn(toy(norm), affine=affine), EXAMPLE)


NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])


def shape_of(model: nn.Module) -> list[tuple]:
    """Everything about the modules that an exact undo gives back, besides the values of tensors."""
    return [
        (name, type(module), sorted(vars(module)), module.training, [p.requires_grad for p in module.parameters()])
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_folded_training_equals_eval_mode_bn(name, dtype, tolerance):
    plain = backbone(name).to(dtype).eval()
    model = folded(name).to(dtype).train()
    assert all(row.folded for row in fold_report(model))
    x = images(2).to(dtype)
    wanted = outcome(plain, x)
    assert relative_error(outcome(model, x), wanted) < tolerance
    with torch.no_grad():
        assert relative_error({"output": model.eval()(x)}, {"output": wanted["output"]}) < tolerance


@NORMS
def test_an_optimizer_made_before_folding_trains_as_it_does_with_eval_mode_bn(norm):
    models = toy(norm).double().eval(), freeze_bn(toy(norm).double(), affine=False)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1) for m in models]
    fold_bn(models[1], EXAMPLE)
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(images(seed=step).double()).square().sum().backward()
            optimizer.step()
    assert relative_error(tensors_of(models[1]), tensors_of(models[0])) < 1e-9


@pytest.mark.parametrize("name", BACKBONES)
def test_folding_keeps_parameters_and_state_and_is_undone_exactly(name):
    model = frozen(name)
    before, parameters, state = shape_of(model), list(model.parameters()), tensors_of(model)
    buffers = dict(model.named_buffers())
    fold_bn(model, EXAMPLE)
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    torch.testing.assert_close(tensors_of(model), state, rtol=0, atol=0)
    backbone(name).load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(backbone(name).state_dict(), strict=True)
    assert all(isinstance(model.get_submodule(n), type(m)) for n, m in backbone(name).named_modules())
    unfold_bn(model)
    assert shape_of(model) == before
    assert all(buffer is buffers[n] for n, buffer in model.named_buffers())


def test_folding_twice_is_folding_once():
    model = folded_toy()
    report = fold_report(model)
    fold_bn(model, EXAMPLE)
    assert fold_report(model) == report
    unfold_bn(unfold_bn(model))
    assert not fold_report(model).folded
    assert type(model[0]) is nn.Conv2d


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "ema": lambda model: ModelEmaV3(model).module,
    "average": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize("how", COPIES)
@NORMS
def test_copies_fold_their_own_parameters(norm, how):
    model = folded_toy(norm)
    twin = COPIES[how](model)
    assert fold_report(twin) == fold_report(model)
    torch.testing.assert_close(twin(images()), model(images()))
    before = model(images())
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.mul_(0)
    torch.testing.assert_close(model(images()), before, rtol=0, atol=0)
    assert not twin(images()).any()
    unfold_bn(twin)
    assert fold_report(model).folded == ["1", "4"]


def test_a_pickled_model_of_a_native_frozen_class_stays_folded():
    model = fold_bn(toy(FrozenBatchNorm2d).double(), EXAMPLE)
    twin = pickle.loads(pickle.dumps(model))
    assert fold_report(twin).folded == ["4"]
    torch.testing.assert_close(twin.eval()(images().double()), model.eval()(images().double()))


def test_layers_frozen_by_timm_fold():
    plain, model = toy(BatchNormAct2d).double().eval(), freeze_batch_norm_2d(toy(BatchNormAct2d).double())
    before, x = shape_of(model), images().double()
    wanted = outcome(model, x)
    fold_bn(model, EXAMPLE)
    assert fold_report(model).folded == ["1", "4"]
    assert relative_error(outcome(model, x), wanted) < 1e-10
    with no_stat_updates(model):
        torch.testing.assert_close(model(x), plain(x))
    restore_bn(model)
    assert shape_of(model) == before


CHANGES = {
    "affine": lambda m: apply_policy(m, BNPolicy(affine="frozen", layers="1")),
    "unfreeze": lambda m: unfreeze_bn(m, affine=False, layers="1"),
    "evaluation": lambda m: apply_policy(m, BNPolicy(eval_stats="batch", layers="1")),
    "submodule": lambda m: apply_policy(m[1], BNPolicy(train_stats="batch", update_stats="ema")),
}


@pytest.mark.parametrize("change", CHANGES)
@NORMS
def test_a_change_of_policy_unfolds_that_layer_first(norm, change):
    model, never_folded = folded_toy(norm).double(), freeze_bn(toy(norm), affine=False).double()
    CHANGES[change](model)
    CHANGES[change](never_folded)
    assert fold_report(model).folded == ["4"]
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(images().double()), never_folded.train(mode)(images().double()))
    torch.testing.assert_close(tensors_of(model), tensors_of(never_folded))


@pytest.mark.parametrize("name", BACKBONES)
def test_restoring_unfolds(name):
    model = backbone(name)
    before = shape_of(model)
    fold_bn(freeze_bn(model), EXAMPLE)
    restore_bn(model)
    assert shape_of(model) == before
    torch.testing.assert_close(model(images()), backbone(name)(images()), rtol=0, atol=0)


def test_a_refused_change_leaves_the_model_folded():
    model = folded_toy()
    with pytest.raises(SelectionError):
        apply_policy(model, BNPolicy(affine="frozen", layers="nothing.*"))
    assert fold_report(model).folded == ["1", "4"]


def test_unfolded_refolds_even_after_an_error_but_not_what_was_thawed():
    model = folded_toy()
    with unfolded(model):
        assert not fold_report(model).folded
        assert type(model[0]) is nn.Conv2d
    with pytest.raises(PolicyError), unfolded(model):
        fold_bn(toy(), EXAMPLE)
    assert fold_report(model).folded == ["1", "4"]
    with unfolded(model):
        unfreeze_bn(model, layers="4")
    assert fold_report(model).folded == ["1"]


def test_each_domain_folds_its_own_statistics():
    model = freeze_bn(apply_policy(toy().double(), BNPolicy(domains=("a", "b"))), affine=False)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "bn_b_running" in name:
                buffer.add_(0.5)
    wanted = {}
    for name in ("a", "b", None):
        with domain(model, name):
            wanted[name] = model(images().double())
    fold_bn(model, EXAMPLE)
    for name in ("a", "b", None):
        with domain(model, name):
            torch.testing.assert_close(model(images().double()), wanted[name])
    assert (wanted["a"] - wanted["b"]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 32), (1, 7)], ids=["as one", "one after the other"])
@NORMS
def test_autocast_is_as_exact_as_with_eval_mode_bn(norm, dtype, shape):
    x, plain, model = images(*shape), toy(norm).eval(), folded_toy(norm)
    truth = outcome(copy.deepcopy(plain).double(), x.double())
    with torch.autocast("cpu", dtype):
        assert model(x).dtype == plain(x).dtype == dtype
    errors = {}
    for which, module in (("folded", model), ("plain", plain)):
        module.forward = torch.autocast("cpu", dtype)(module.forward)
        errors[which] = relative_error({k: v.double() for k, v in outcome(module, x).items()}, truth)
    assert errors["folded"] < 1.5 * errors["plain"]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(8, 32), (1, 7)], ids=["as one", "one after the other"])
def test_half_precision_models_are_as_exact_as_with_eval_mode_bn(shape, affine):
    half = images(*shape).bfloat16()
    plain, model = (m.bfloat16() for m in (freeze_bn(toy(), affine=affine), folded_toy(affine=affine)))
    truth = outcome(copy.deepcopy(plain).double(), half.double())
    folded_error, plain_error = (
        relative_error({k: v.double() for k, v in outcome(m, half).items()}, truth) for m in (model, plain)
    )
    assert folded_error < 1.5 * plain_error


def test_second_derivatives_under_autocast():
    found = []
    for model in (folded_toy(), freeze_bn(toy(), affine=False)):
        model[2] = nn.Tanh()
        x = images(2, 12).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        (slope,) = torch.autograd.grad(output.float().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert relative_error(*found) < 0.1


def test_half_precision_models_fold_in_float32():
    model = folded_toy().to(torch.bfloat16)
    weight, bias = fold_parameters(model[3], model[4])
    exact = fold_parameters(model.double()[3], model[4])
    assert weight.dtype == bias.dtype == torch.bfloat16
    assert weight.equal(exact[0].bfloat16())
    assert bias.equal(exact[1].bfloat16())


def test_channels_last_stays():
    model = folded_toy().to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    assert fold_parameters(model[3], model[4])[0].is_contiguous(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x).contiguous(), toy().eval()(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradient_checkpointing_between_conv_and_bn(reentrant, affine):
    plain, model = freeze_bn(toy(), affine=affine).double(), folded_toy(affine=affine).double()
    wanted = outcome(plain, images().double())

    def cut(x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(model[:1], x, use_reentrant=reentrant)
        return checkpoint(model[1:], x, use_reentrant=reentrant)

    x = images().double().requires_grad_()
    output = cut(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    grads = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error({"output": output.detach(), "x.grad": x.grad, **grads}, wanted) < 1e-10


def test_checkpointing_of_the_backbone_and_accumulation():
    model, plain = folded("efficientnet_b0").double(), backbone("efficientnet_b0").double().eval()
    model.set_grad_checkpointing()
    for m in (model, plain):
        for seed in range(2):
            m(images(1, seed=seed).double()).square().sum().backward()
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (model, plain)]
    assert relative_error(*grads) < 1e-10


@pytest.mark.parametrize("shape", [(8, 32), (1, 7)], ids=["as one", "one after the other"])
def test_buffers_rewritten_between_forward_and_backward_do_no_harm(shape):
    """As DDP does when it broadcasts buffers at a second forward."""
    model, plain = folded_toy().double(), freeze_bn(toy(), affine=False).double()
    wanted = outcome(plain, images(*shape).double())
    output = model(images(*shape).double())
    for buffer in model.buffers():
        buffer.copy_(torch.ones_like(buffer))
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[f"{name}.grad"])


@pytest.mark.parametrize("size", [7, 12], ids=["one after the other", "as one"])
@pytest.mark.parametrize("affine", [True, False])
def test_second_derivatives(size, affine):
    model = folded_toy(affine=affine).double()
    model[2] = nn.Tanh()
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inputs = [p.detach().clone().requires_grad_() for p in learned.values()]
    x = images(1, size=size).double()

    def run(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(learned, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_per_sample_by_functional_transforms(affine):
    model, plain = folded_toy(affine=affine).double(), freeze_bn(toy(), affine=affine).double().eval()
    x = images(3, size=8).double()

    def grads(module: nn.Module) -> dict[str, torch.Tensor]:
        def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(module, parameters, (image[None],)).square().sum()

        parameters = {n: p.detach() for n, p in module.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    torch.testing.assert_close(grads(model), grads(plain))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("affine", [True, False])
def test_backward_keeps_no_more_than_without_norm(name, affine):
    """But for `W s`, or outputs of layers that have more weights than these, and a few numbers per channel."""
    model, bare = folded(name, affine=affine), without_norm(backbone(name))
    channels = sum(4 * layer.running_mean.nbytes for layer in find_bn_layers(model).values())
    weights = sum(p.nbytes for p in model.parameters() if p.ndim == 4)
    for x in (images(2, 64), images(4, 160)):
        found = bytes_kept(model, x)
        assert found <= bytes_kept(bare, x) + channels + weights
    assert found < 0.75 * bytes_kept(backbone(name).eval(), x)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("affine", [True, False])
def test_backward_keeps_no_more_than_without_norm_under_autocast(name, affine):
    """Autocast keeps each W in half precision; of folded layers it is `W s`, and three numbers per channel."""
    model, bare = folded(name, affine=affine), without_norm(backbone(name))
    layers = find_bn_layers(model).values()
    channels = sum(4 * layer.running_mean.nbytes for layer in layers)
    weights = 0 if affine else sum(p.nbytes for p in model.parameters() if p.ndim == 4)
    with torch.autocast("cpu", torch.bfloat16):
        kept = {which: bytes_kept(module, images(4, 160)) for which, module in (("folded", model), ("bare", bare))}
    assert kept["folded"] <= kept["bare"] + channels + weights


@pytest.mark.parametrize("affine", [True, False])
def test_an_empty_batch_has_gradients_of_zero(affine):
    found = outcome(folded_toy(affine=affine), images(0))
    assert found["x.grad"].shape == images(0).shape
    assert all(not grad.any() for name, grad in found.items() if name.endswith("grad"))


def test_frozen_layers_that_cannot_be_folded_keep_nothing():
    model = fold_bn(freeze_bn(randomise(timm.create_model("densenet121", num_classes=5))), EXAMPLE)
    report = fold_report(model)
    assert len(report.folded) == 59
    assert {row.remark for row in report if not row.folded} == {
        "an input of it comes from no convolution directly; one pass, keeps nothing"
    }
    bare = without_norm(timm.create_model("densenet121", num_classes=5))
    weights = sum(p.nbytes for p in model.parameters())
    assert bytes_kept(model, images(2, 64)) <= bytes_kept(bare, images(2, 64)) + weights


def test_a_frozen_leading_part_builds_no_graph():
    model = folded_toy(affine=True)
    model[0].requires_grad_(False)
    assert not model[:3](images()).requires_grad
    assert model(images()).requires_grad


@pytest.fixture
def counted(monkeypatch):
    """How often parameters were folded, as the length of a list."""
    calls: list[str] = []

    def count(name):
        original = getattr(arithmetic, name)
        monkeypatch.setattr(arithmetic, name, lambda *args: calls.append(name) or original(*args))

    count("fold_with")
    count("normalise_outputs")
    return calls


def all_frozen() -> nn.Module:
    return folded_toy(affine=True).requires_grad_(False)


def test_frozen_pairs_are_folded_once_only_where_somebody_owns_all_updates(counted):
    model = unfold_bn(all_frozen())
    wanted = model(images())
    for keep, times in ((True, 2), (False, 6)):
        counted.clear()
        with folding.folded(model, EXAMPLE, keep=keep):
            for _ in range(3):
                torch.testing.assert_close(model(images()), wanted, rtol=1e-4, atol=1e-5)
        assert len(counted) == times
    with folding.folded(model, EXAMPLE, keep=True):
        model(images())
        model[1].weight.requires_grad_(True)
        counted.clear()
        for _ in range(3):
            model(images())
        assert len(counted) == 3


def test_the_context_unfolds_even_after_an_error():
    model = freeze_bn(toy())
    with contextlib.suppress(ZeroDivisionError), folding.folded(model, EXAMPLE, keep=True):
        assert fold_report(model).folded == ["1", "4"]
        raise ZeroDivisionError
    assert not fold_report(model).folded
    assert shape_of(model) == shape_of(freeze_bn(toy()))


def test_outputs_are_normalised_where_they_are_fewer_than_the_weights(counted):
    """Per channel the toy's convs have 27 and 54 weights, and 25 and 9 outputs of an image of 7 x 7."""
    model = folded_toy()
    model(images(1, 7))
    assert counted == ["normalise_outputs", "normalise_outputs"]
    model(images(1, 8))
    assert counted[2:] == ["fold_with", "normalise_outputs"]
    model(images(4, 8))
    assert counted[4:] == ["fold_with", "fold_with"]


WRITES = {
    "in place": lambda m: m[0].weight.mul_(2),
    "statistics": lambda m: m[1].running_var.mul_(2),
    "new memory": lambda m: setattr(m[3].weight, "data", m[3].weight * 2),
    "new parameter": lambda m: setattr(m[3], "weight", nn.Parameter(m[3].weight * 2, False)),
    "bias": lambda m: m[3].bias.add_(2),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
    "load": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "to": lambda m: m.to(torch.float64),
    "behind the version": lambda m: m[0].weight.data.mul_(2),
    "statistics behind the version": lambda m: m[1].running_var.data.mul_(2),
    "apply": lambda m: m[1]._apply(lambda t: t.data.mul_(2) if t.is_floating_point() else t),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("keep", [False, True])
def test_frozen_pairs_see_every_change(how, keep):
    if keep and how in ("behind the version", "statistics behind the version", "apply"):
        return  # what only the owner of a scope that keeps could do, and promises not to
    model = all_frozen()
    with folding.folds_kept(model) if keep else contextlib.nullcontext():
        before = model(images())
        with torch.no_grad():
            WRITES[how](model)
        x = images().to(model[0].weight.dtype)
        torch.testing.assert_close(model(x), unfold_bn(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-5)
        assert how == "to" or (model(x) - before).abs().max() > 1e-3


def test_what_was_kept_in_inference_mode_serves_training_too():
    model = all_frozen()
    x = images().requires_grad_()
    with folding.folds_kept(model):
        with torch.inference_mode():
            wanted = model(images())
        output = model(x)
    output.sum().backward()
    torch.testing.assert_close(output, wanted.clone())
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_computed_in_inference_mode_fold(frozen):
    model = all_frozen() if frozen else folded_toy()
    model(images())
    with torch.inference_mode():
        model[1].running_var = model[1].running_var * 2
    torch.testing.assert_close(model(images()), unfold_bn(copy.deepcopy(model))(images()), rtol=1e-4, atol=1e-5)


def test_parameters_that_are_widened_alone_fold_in_their_own_precision():
    """Assigned to `data`, as some optimizers keep master weights: no method of the module learns of it."""
    model = folded_toy()
    model(images())
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    wanted = unfold_bn(copy.deepcopy(model)).double()(images().double())
    torch.testing.assert_close(model(images().double()), wanted, rtol=1e-12, atol=1e-12)


def test_copies_take_nothing_kept_along():
    model = all_frozen()
    with folding.folds_kept(model):
        model(images())
        assert model[1]._fold_keeper is not None
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin[1]._fold_keeper is None
        assert len(pickle.dumps(model)) == len(pickle.dumps(all_frozen()))
    assert model[1]._fold_keeper is None


def test_the_observed_forward_leaves_no_trace():
    model = freeze_bn(backbone("efficientnet_b0"), affine=False)
    model.blocks[3].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    seen = []
    handle = model.register_forward_pre_hook(
        lambda m, args: seen.append((m.training, m.blocks[0].training, torch.is_grad_enabled(), args[0].shape))
    )
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    fold_bn(model)
    assert torch.rand(2).equal(wanted)
    handle.remove()
    assert seen == [(mode, mode, True, (1, 3, 224, 224)) for mode in (False, True)]
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_dropout_in_training_stays_random():
    model = toy()
    model.insert(3, nn.Dropout(0.5))
    fold_bn(freeze_bn(model), EXAMPLE)
    assert fold_report(model).folded == ["1", "5"]
    assert not model(images()).equal(model(images()))


def test_a_model_that_fails_on_its_input_stays_as_it_was():
    model = folded_toy()
    before = shape_of(model)
    with pytest.raises(PolicyError, match=r"Sequential fails on the example input .*pass an example_input"):
        fold_bn(model, images()[:, :2])
    assert shape_of(model) == before


def test_errors_name_the_remedy():
    with pytest.raises(PolicyError, match="pass example_input"):
        fold_bn(freeze_bn(toy()))
    with pytest.raises(PolicyError, match=r"'0'|'1' has switches \(batch, ema, trained, running\).*freeze_bn"):
        fold_bn(toy(), EXAMPLE)
    with pytest.raises(SelectionError, match="no BatchNorm layer in Sequential"):
        fold_bn(nn.Sequential(nn.Conv2d(3, 3, 1)), EXAMPLE)
    assert issubclass(PolicyError, BnFinetuneError)


def test_statistics_that_still_move_are_not_folded():
    model = freeze_bn(backbone("resnet18"))
    unfreeze_bn(model, affine=False, layers="layer3.*")
    apply_policy(model, BNPolicy(eval_stats="mix", layers="layer4.*"))
    fold_bn(model, EXAMPLE)
    remarks = {row.layer: row.remark for row in fold_report(model)}
    assert remarks["layer3.0.bn1"] == "its statistics are not frozen: (batch, ema, frozen, running)"
    assert remarks["layer4.0.bn1"] == "its statistics are not frozen: (running, none, frozen, mix)"
    assert len(fold_report(model).folded) == 10


def test_the_report_is_saved(tmp_path):
    report = fold_report(folded_toy())
    report.save(tmp_path / "folds.json")
    saved = json.loads((tmp_path / "folds.json").read_text())
    assert [(row["layer"], row["conv"], row["remark"]) for row in saved["layers"]] == [("1", "0", ""), ("4", "3", "")]


def test_the_report_reads_as_a_table():
    lines = str(fold_report(folded_toy())).splitlines()
    assert lines == ["layer  folded into  remark", "1      0", "4      3"]


def test_folding_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = folded("efficientnet_b0")
        model.set_grad_checkpointing()
        fold_bn(model, EXAMPLE)
