"""Which convs can take a BN layer in is found by what flows, whatever the conv is called and however it computes."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrizations import weight_norm

from bnfinetune.bn import find_bn_layers, freeze_bn
from bnfinetune.bn.folding.fold import fold_bn, fold_report, unfold_bn
from tests.bn.folding.outcomes import outcome, relative_error
from tests.bn.models import backbone, images, randomise


class Shouting(nn.Conv2d):
    """Its own forward, which still is one convolution with weight and bias."""

    def forward(self, x):
        return super().forward(x.flip(-1)).flip(-1)


class Renaming(nn.Conv2d):
    """Its own step, which is one convolution and calls its arguments otherwise."""

    def _conv_forward(self, x, w, b):
        return super()._conv_forward(x.flip(-1), w, b).flip(-1)


class Bounded(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).tanh()


class TwoStep(nn.Conv2d):
    """Ignores the parameters that it is given, in favour of what it remembers."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.detach() / weight.detach().norm(), bias)


def ordinary(spatial: int) -> tuple[type[nn.Module], type[nn.Module]]:
    return ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[spatial - 1]


FOLDABLE = {
    "plain": nn.Conv2d(4, 6, 3, bias=False),
    "with bias": nn.Conv2d(4, 6, 3),
    "strided, padded": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "reflecting": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2),
    "1d": nn.Conv1d(4, 6, 3),
    "3d": nn.Conv3d(4, 6, 2),
    "timm same": Conv2dSame(4, 6, 3, stride=2),
    "own forward": Shouting(4, 6, 3),
    "own step": Renaming(4, 6, 3),
    "linear": nn.Linear(4, 6),
}

NOT_FOLDABLE = {
    "standardised": (StdConv2d(4, 6, 3), "does more than one convolution"),
    "bounded": (Bounded(4, 6, 3), "does more than one convolution"),
    "own weight": (TwoStep(4, 6, 3), "does more than one convolution"),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), "is transposed and grouped"),
    "weight norm": (weight_norm(nn.Conv2d(4, 6, 3)), "computes its weight"),
    "pruned": (prune.random_unstructured(nn.Conv2d(4, 6, 3), "weight", 0.5), "computes its weight"),
    "spectral norm": (parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)), "computes its weight"),
}


def batch_for(conv: nn.Module) -> torch.Tensor:
    dims = conv.weight.ndim - 2
    return torch.randn(5, 4, *[9] * dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def frozen(*modules: nn.Module) -> nn.Sequential:
    return freeze_bn(randomise(nn.Sequential(*modules)).double(), affine=False)


def behind(conv: nn.Module) -> nn.Sequential:
    dims, channels = conv.weight.ndim - 2, getattr(conv, "out_channels", 6)
    torch.manual_seed(0)
    for parameter in conv.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return frozen(conv, ordinary(max(dims, 1))[1](channels), nn.Tanh())


@pytest.mark.parametrize("how", FOLDABLE)
def test_every_kind_of_conv_folds(how):
    model = behind(FOLDABLE[how])
    x = batch_for(FOLDABLE[how])
    wanted = outcome(model, x)
    fold_bn(model, x[:2])
    assert fold_report(model).folded == ["1"]
    assert relative_error(outcome(model, x), wanted) < 1e-12
    assert {"0.weight.grad", "1.weight.grad", "1.bias.grad"} < wanted.keys()
    unfold_bn(model)


@pytest.mark.parametrize("how", NOT_FOLDABLE)
def test_convs_that_compute_otherwise_are_left_alone(how):
    conv, reason = NOT_FOLDABLE[how]
    model = behind(conv)
    x, kind = batch_for(conv), type(conv)
    fold_bn(model, x)
    assert fold_report(model)[0].remark.startswith(f"'0' before it {reason}")
    assert type(conv) is kind


@pytest.mark.parametrize("affine", [True, False])
def test_bn_with_and_without_affine_folds(affine):
    model = frozen(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=affine))
    x = batch_for(model[0])
    wanted = outcome(model, x)
    fold_bn(model, x)
    assert relative_error(outcome(model, x), wanted) < 1e-12


class Net(nn.Module):
    """Two convs and two BN layers, wired by a function."""

    def __init__(self, wiring) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self, x)


def residual(m, x):
    y = m.conv(x)
    return m.bn2(m.conv2(m.bn(y) + y))


def in_place(m, x):
    return m.bn2(m.conv2(m.bn(m.conv(x).add_(1))))


def reads_size(m, x):
    y = m.conv(x)
    return m.bn2(m.conv2(m.bn(y) * math.sqrt(y.shape[1])))


def two_norms(m, x):
    y = m.conv(x)
    return m.bn(y) + m.bn2(y)


def shared_conv(m, x):
    return m.bn2(m.conv(m.bn(m.conv(x))))


def shared_pair(m, x):
    return m.bn2(m.conv2(m.bn(m.conv(m.bn(m.conv(x))))))


def shared_norm(m, x):
    return m.bn(m.conv2(m.bn(m.conv(x))))


def shared_norm_once_without_conv(m, x):
    return m.bn(m.bn(m.conv(x)).relu())


def pre_activation(m, x):
    return m.conv2(m.bn2(m.conv(m.bn(x))))


def reshaped(m, x):
    y = m.conv(x)
    return m.bn2(m.conv2(m.bn(y.flatten(2).unflatten(2, y.shape[2:]))))


def viewed(m, x):
    return m.bn2(m.conv2(m.bn(m.conv(x))[..., 1:]))


def kept(m, x):
    m.seen = m.conv(x)
    return m.bn2(m.conv2(m.bn(m.seen)))


def branch_run_in_training_alone(m, x):
    y = m.bn(m.conv(x))
    return y + m.bn2(m.conv2(y)) if m.training else y


WIRINGS = {
    residual: ["bn2"],
    in_place: ["bn2"],
    reads_size: ["bn", "bn2"],
    two_norms: [],
    shared_conv: [],
    shared_pair: ["bn", "bn2"],
    shared_norm: ["bn"],
    shared_norm_once_without_conv: [],
    pre_activation: ["bn2"],
    reshaped: ["bn2"],
    viewed: ["bn", "bn2"],
    kept: ["bn2"],
    branch_run_in_training_alone: ["bn", "bn2"],
}


@pytest.mark.parametrize("wiring", WIRINGS, ids=lambda f: f.__name__)
def test_only_convs_that_feed_nothing_else_fold(wiring):
    torch.manual_seed(0)
    model = freeze_bn(randomise(Net(wiring)).double(), affine=False)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    wanted = {mode: outcome(model.train(mode), x) for mode in (True, False)}
    fold_bn(model, x[:1])
    assert fold_report(model).folded == WIRINGS[wiring]
    for mode in (True, False):
        assert relative_error(outcome(model.train(mode), x), wanted[mode]) < 1e-12


def test_an_output_that_is_also_returned_is_not_folded():
    model = freeze_bn(randomise(Net(lambda m, x: (y := m.conv(x), m.bn(y)))), affine=False)
    fold_bn(model, torch.zeros(1, 4, 6, 6))
    assert fold_report(model)[0].remark == (
        "'conv' before it feeds something else as well; keeps its input, since its affine trains"
    )
    assert fold_report(model)[1].remark.startswith("not reached by the observed forward")


HOOKS = {
    "forward": lambda m: m[0].register_forward_hook(lambda *_: None),
    "backward": lambda m: m[0].register_full_backward_hook(lambda *_: None),
    "before backward": lambda m: m[0].register_full_backward_pre_hook(lambda *_: None),
    "of bn, before backward": lambda m: m[1].register_full_backward_pre_hook(lambda *_: None),
    "of bn": lambda m: m[1].register_forward_hook(lambda *_: None),
    "into bn": lambda m: m[1].register_forward_pre_hook(lambda *_: None),
    "replaced": lambda m: setattr(m[0], "forward", m[0].forward),
}


@pytest.mark.parametrize("how", HOOKS)
def test_layers_that_somebody_watches_are_left_alone(how):
    model = frozen(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    HOOKS[how](model)
    fold_bn(model, torch.zeros(1, 4, 9, 9))
    # full backward hooks hand on a view of what the conv gives
    expected = (
        "comes from no convolution directly" if "backward" in how and how[:2] != "of" else "has hooks or a replaced"
    )
    assert expected in fold_report(model)[0].remark
    assert fold_report(model).folded == ["3"]


class Caching(nn.Conv2d):
    """Keeps what it made of its weight while it evaluates, and drops it when it is told to train."""

    cache = None

    def train(self, mode=True):
        self.cache = None if mode else self.cache
        return super().train(mode)

    def forward(self, x):
        if not self.training and self.cache is None:
            self.cache = self.weight.detach() * 1
        return F.conv2d(x, self.weight if self.training else self.cache, self.bias)


def test_modules_that_cache_in_evaluation_are_told_to_train_again():
    model = frozen(Caching(4, 6, 3), nn.BatchNorm2d(6))
    fold_bn(model.train(), torch.zeros(1, 4, 9, 9))
    assert model[0].cache is None
    with torch.no_grad():
        model[0].weight.mul_(2)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    trained, evaluated = model(x), model.eval()(x)
    torch.testing.assert_close(evaluated, trained)


class Tokens(nn.Module):
    """BN over the features of tokens, as in LeViT: laid side by side for the layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear, self.bn, self.dim = nn.Linear(4, 6), nn.BatchNorm1d(6), dim

    def forward(self, x):
        y = self.linear(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y) if self.dim == 2 else self.bn(y)


@pytest.mark.parametrize("dim", [2, 3])
def test_linear_layers_fold_where_bn_runs_over_their_features(dim):
    model = freeze_bn(randomise(Tokens(dim)).double(), affine=False)
    x = torch.randn(3, 6, 4, dtype=torch.float64)  # as many tokens as features: BN over tokens does not stand out
    wanted = outcome(model, x)
    fold_bn(model, x)
    assert fold_report(model).folded == (["bn"] if dim == 2 else [])
    assert relative_error(outcome(model, x), wanted) < 1e-12


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, images, scale):
        return self.bn(self.conv(images)) * scale


@pytest.mark.parametrize("form", [tuple, lambda pair: {"images": pair[0], "scale": pair[1]}])
def test_an_example_may_hold_several_arguments_of_any_dtype(form):
    model = freeze_bn(randomise(Named()).double())
    fold_bn(model, form((torch.zeros(1, 4, 6, 6), torch.ones(1))))
    assert fold_report(model).folded == ["bn"]
    assert len(find_bn_layers(model)) == 1


def test_a_classifier_whose_output_is_returned_costs_no_garbage_collection(monkeypatch):
    """Collecting takes a multiple of the observed forward, and only a conv before a BN layer could need it."""
    monkeypatch.setattr(gc, "collect", lambda: pytest.fail("garbage was collected"))
    model = fold_bn(freeze_bn(backbone("resnet18")), images(1))
    assert len(fold_report(model).folded) == 20
