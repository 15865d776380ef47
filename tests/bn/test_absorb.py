"""Absorbing keeps the function and the names; what trains afterwards trains as the weights of a fused network do."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from bnfinetune.bn import BNPolicy, apply_policy, freeze_bn
from bnfinetune.bn.absorb import absorb_bn
from bnfinetune.bn.folding.fold import fold_bn, fold_report
from bnfinetune.bn.folding.fuse import fuse_bn
from bnfinetune.errors import LayerError, PolicyError
from tests.bn.distributed import run_ranks
from tests.bn.models import BACKBONES, backbone, images, randomise, toy

EXAMPLE = images(1)
NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])


@pytest.mark.parametrize("name", [*BACKBONES, "resnetv2_18"])
def test_the_function_and_the_names_stay(name):
    model = freeze_bn(randomise(timm.create_model(name, num_classes=5))).double()
    before, parameters, x = copy.deepcopy(model), list(model.parameters()), images(2).double()
    assert absorb_bn(model, EXAMPLE) is model
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    torch.testing.assert_close(model(x), before(x), rtol=1e-10, atol=1e-10)
    again = timm.create_model(name, num_classes=5).double()
    again.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(again.eval()(x), before(x), rtol=1e-10, atol=1e-10)
    fold_bn(model, EXAMPLE)
    torch.testing.assert_close(model(x), before(x), rtol=1e-10, atol=1e-10)


def toy_of(norm, biased: bool) -> nn.Module:
    model = toy(norm).double()
    for conv in (model[0], model[3]):
        conv.bias = conv.bias if biased else None
    return model


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_it_trains_as_the_fused_network_does(norm, biased):
    absorbed = fold_bn(absorb_bn(freeze_bn(toy_of(norm, biased)), EXAMPLE), EXAMPLE)
    models = fuse_bn(toy_of(norm, biased), EXAMPLE), absorbed
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, 0.9, weight_decay=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            model(images(seed=seed).double()).square().mean().backward()
            optimizer.step()
    fused = models[0]
    for conv, layer in (("0", "1"), ("3", "4")):
        torch.testing.assert_close(absorbed.get_submodule(conv).weight, fused.get_submodule(conv).weight)
        owner = absorbed.get_submodule(conv if biased else layer)
        torch.testing.assert_close(owner.bias, fused.get_submodule(conv).bias)
        assert not absorbed.get_submodule(layer).weight.requires_grad
    assert fold_report(absorbed).folded == ["1", "4"]


def test_what_learnt_nothing_learns_nothing():
    model = freeze_bn(backbone("resnet18"))
    model.layer1.requires_grad_(False)
    absorb_bn(model, EXAMPLE)
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert model.layer2[0].conv1.weight.requires_grad
    assert model.layer2[0].bn1.bias.requires_grad
    assert not model.layer2[0].bn1.weight.requires_grad


def test_errors_name_the_layer():
    with pytest.raises(PolicyError, match=r"'bn1' has no fixed statistics to absorb \(batch, ema.*freeze_bn"):
        absorb_bn(backbone("resnet18"), EXAMPLE)
    half = apply_policy(backbone("resnet18"), BNPolicy(train_stats="running", update_stats="none", layers="bn1"))
    with pytest.raises(PolicyError, match="layer1"):
        absorb_bn(half, EXAMPLE)
    domains = freeze_bn(apply_policy(toy(), BNPolicy(domains=("a", "b"))))
    with pytest.raises(PolicyError, match="'1' has statistics of several domains"):
        absorb_bn(domains, EXAMPLE)
    bare = freeze_bn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))
    with pytest.raises(LayerError, match="'1' has no weight and bias"):
        absorb_bn(bare, EXAMPLE)


class Dropping(nn.Module):
    """Conv, dropout and BN: one function in evaluation, another in training."""

    def __init__(self, norm: type[nn.Module], dropout: nn.Module) -> None:
        super().__init__()
        self.conv, self.dropout, self.bn = nn.Conv2d(3, 6, 3), dropout, norm(6)

    def forward(self, x):
        return self.bn(self.dropout(self.conv(x)))


class TrainingNoise(nn.Module):
    def forward(self, x):
        return x * (1 + torch.rand_like(x)) if self.training else x


@NORMS
@pytest.mark.parametrize(
    "dropout", [nn.Dropout(0.5), nn.Dropout2d(0.5), TrainingNoise()], ids=lambda m: type(m).__name__
)
def test_what_runs_in_training_alone_is_seen(norm, dropout):
    plain = freeze_bn(randomise(Dropping(norm, dropout)).double())
    model = absorb_bn(copy.deepcopy(plain), EXAMPLE)
    for mode in (True, False):
        outputs = []
        for net in (plain, model):
            torch.manual_seed(2)
            outputs.append(net.train(mode)(images().double()))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)


class Tied(nn.Module):
    """Two pairs; a test says what they share."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3), norm(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3), norm(3)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn(self.conv(x))))


@NORMS
def test_convs_that_share_a_weight_keep_it(norm):
    model = randomise(Tied(norm)).double()
    model.conv2.weight = model.conv.weight
    freeze_bn(model)
    before = copy.deepcopy(model)
    absorb_bn(model, EXAMPLE)
    assert model.conv2.weight is model.conv.weight
    torch.testing.assert_close(model(images().double()), before(images().double()), rtol=1e-10, atol=1e-10)


@NORMS
@pytest.mark.parametrize("key", ["weight", "bias", "running_mean"])
def test_bn_layers_that_share_what_would_change_are_refused(norm, key):
    model = randomise(Tied(norm))
    setattr(model.bn2, key, getattr(model.bn, key))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LayerError, match=f"'bn' shares its {key} with another module"):
        absorb_bn(freeze_bn(model), EXAMPLE)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def ddp_rank(rank: int) -> str:
    wrapped = nn.parallel.DistributedDataParallel(freeze_bn(toy()))
    with pytest.raises(PolicyError) as caught:
        absorb_bn(wrapped, EXAMPLE)
    return str(caught.value)


def test_a_ddp_wrapper_is_refused(tmp_path):
    assert "DistributedDataParallel" in run_ranks(1, ddp_rank, tmp_path)[0]


def test_a_model_that_cannot_train_on_its_example_is_refused():
    class NeedsTargets(Dropping):
        def forward(self, x, targets=None):
            if self.training and targets is None:
                raise ValueError("no targets")
            return super().forward(x)

    with pytest.raises(PolicyError, match=r"fails on the example input in training \(ValueError: no targets\)"):
        absorb_bn(freeze_bn(NeedsTargets(nn.BatchNorm2d, nn.Identity())), EXAMPLE)
