"""Folded models under DDP, `torch.compile` and `torch.export`."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnfinetune.bn import BNPolicy, apply_policy, freeze_bn, unfreeze_bn
from bnfinetune.bn.folding.fold import fold_bn, fold_report, unfold_bn
from tests.bn.distributed import run_ranks
from tests.bn.folding.outcomes import outcome, relative_error
from tests.bn.models import BACKBONES, backbone, images, toy

EXAMPLE = images(1)


def folded_toy(*, affine: bool = False) -> nn.Module:
    return fold_bn(freeze_bn(toy(), affine=affine).double(), EXAMPLE)


def ddp_rank(rank: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Two forwards, then one backward: DDP overwrites the buffers in between."""
    wrapped = DistributedDataParallel(freeze_bn(toy(), affine=False).double())
    fold_bn(wrapped, EXAMPLE)
    first, second = (wrapped(images(seed=10 * rank + seed).double()) for seed in range(2))
    (first.square().sum() + second.sin().sum()).backward()
    return {name: p.grad for name, p in wrapped.module.named_parameters()}, fold_report(wrapped).folded


def test_ddp_averages_the_gradients_of_folded_models(tmp_path):
    plain = toy().double().eval()
    for rank in range(2):
        first, second = (plain(images(seed=10 * rank + seed).double()) for seed in range(2))
        ((first.square().sum() + second.sin().sum()) / 2).backward()
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    for grads, folded in run_ranks(2, ddp_rank, tmp_path):
        assert folded == ["1", "4"]
        assert relative_error(grads, wanted) < 1e-12


@pytest.mark.parametrize("affine", [True, False])
def test_compiled_models_follow_folding_and_unfolding(affine):
    torch._dynamo.reset()
    model = freeze_bn(toy(), affine=affine).double()
    x = images().double()
    wanted = outcome(copy.deepcopy(model), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for change in (lambda _: None, lambda m: fold_bn(m, EXAMPLE), unfold_bn, lambda m: fold_bn(m, EXAMPLE)):
        change(compiled)
        found = {name.removeprefix("_orig_mod."): value for name, value in outcome(compiled, x).items()}
        assert relative_error(found, wanted) < 1e-12
    assert fold_report(compiled).folded == ["1", "4"]
    unfreeze_bn(compiled)
    live = apply_policy(toy().double(), BNPolicy(train_stats="batch"))
    torch.testing.assert_close(compiled(x), live(x))


def test_compiled_code_never_uses_kept_parameters():
    torch._dynamo.reset()
    model = folded_toy(affine=True).requires_grad_(False)
    model(images().double())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(images().double())
    model[0].weight.data.mul_(2)  # no version, no new memory: only what is computed anew can see it
    found = compiled(images().double())
    torch.testing.assert_close(found, unfold_bn(copy.deepcopy(model))(images().double()))


def test_exported_models_hold_the_unfolded_parameters():
    model = folded_toy(affine=True).eval()
    program = torch.export.export(model, (images().double(),))
    assert set(program.state_dict) == set(model.state_dict())
    torch.testing.assert_close(program.module()(images().double()), toy().double().eval()(images().double()))


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("name", [*BACKBONES, "tf_efficientnet_b0"])
def test_backbones_compiled_by_inductor_equal_eval_mode_bn(name):
    torch._dynamo.reset()
    wanted = outcome(backbone(name).double().eval(), images(2, 64).double())
    model = fold_bn(freeze_bn(backbone(name).double(), affine=False), EXAMPLE)
    compiled = torch.compile(model, fullgraph=True)
    found = {key.removeprefix("_orig_mod."): value for key, value in outcome(compiled, images(2, 64).double()).items()}
    assert relative_error(found, wanted) < 1e-9
