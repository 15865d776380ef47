"""Classes with a forward of their own: known by registration or by what they compute, and mistaken for no other."""

import copy
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfinetune as bnf
from bnfinetune.bn.layers import bn_class, bn_tail, eps_of
from bnfinetune.errors import LayerError
from tests.bn import oracles
from tests.bn.look_alikes import LOOK_ALIKES, OTHERS, Detr, Renamed
from tests.bn.models import images, tensors_of, toy


def twin_of(layer: nn.Module, eps: float) -> nn.BatchNorm2d:
    """Plain BN in evaluation mode with a frozen layer's values."""
    twin = nn.BatchNorm2d(len(layer.running_mean), eps=max(eps, 1e-30)).to(layer.weight.dtype)
    twin.load_state_dict({**layer.state_dict(), "num_batches_tracked": torch.tensor(0)})
    return twin.eval()


def built(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model whose second norm is a look-alike, and the same with plain BN, in float64."""
    model = toy(cls).double()
    plain = copy.deepcopy(model)
    plain[4] = twin_of(model[4], LOOK_ALIKES[cls])
    return model, plain


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and every gradient of one training step, the input's first."""
    x = x.clone().requires_grad_()
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), wanted)]


@pytest.mark.parametrize("cls", LOOK_ALIKES)
class TestLookAlikes:
    def test_is_described_with_its_eps(self, cls):
        row = bnf.describe_bn(toy(cls))[1]
        assert row[1:6] == (cls.__name__, "running", "none", "frozen", "running")
        assert row.eps == pytest.approx(LOOK_ALIKES[cls], rel=1e-12, abs=1e-29)

    def test_frozen_it_computes_the_same_and_restored_it_is_as_before(self, cls):
        model, plain = built(cls)
        before, state = {**vars(model[4])}, tensors_of(model)
        x = images(4, 12).double()
        plain[1].eval()
        wanted = step(bnf.freeze_bn(plain), x)
        frozen = bnf.freeze_bn(model).train()
        torch.testing.assert_close(step(frozen, x), wanted, rtol=1e-12, atol=1e-12)
        for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            torch.testing.assert_close(step(other, x), wanted, rtol=1e-12, atol=1e-12)
        bnf.restore_bn(model)
        assert type(model[4]) is cls
        assert vars(model[4]).keys() == before.keys()
        torch.testing.assert_close(tensors_of(model), state, rtol=0, atol=0)

    def test_unfrozen_it_trains_as_plain_bn_does(self, cls):
        model, plain = built(cls)
        plain.train()
        bnf.unfreeze_bn(model).train()
        x = images(4, 12).double()
        torch.testing.assert_close(step(model, x), step(plain, x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model[4].running_var, plain[4].running_var)
        bnf.restore_bn(model)
        assert type(model[4]) is cls
        assert not list(model[4].parameters())

    def test_folds_and_fuses(self, cls):
        model, _ = built(cls)
        x = images(4, 12).double()
        wanted = model.eval()(x)
        folded = bnf.fold_bn(copy.deepcopy(model), x)
        torch.testing.assert_close(folded(x), wanted, rtol=1e-12, atol=1e-12)
        assert bnf.fold_report(folded).folded == ["4"]
        torch.testing.assert_close(pickle.loads(pickle.dumps(folded))(x), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(bnf.fuse_bn(model, x)(x), wanted, rtol=1e-10, atol=1e-10)

    def test_its_statistics_are_recomputed_and_inspected_like_bn(self, cls):
        model, plain = built(cls)
        model[1].eval()
        x = images(8, 12).double()
        mean, var, _ = oracles.moments(model[:4](x).detach())
        ours, theirs = (bnf.inspect_bn(each, [x[:4], x[4:]], layers="4") for each in (model, plain))
        assert ours.layers["4"].drift == pytest.approx(theirs.layers["4"].drift, rel=1e-6)
        bnf.precise_bn(model, [x[:4], x[4:]], include_frozen=True, layers="4")
        torch.testing.assert_close(model[4].running_mean, mean)
        torch.testing.assert_close(model[4].running_var, var)

    def test_its_own_updates_under_ema_are_those_of_torch(self, cls):
        model, plain = built(cls)
        x = images(8, 12).double()
        for each in (model, plain):
            bnf.precise_bn(each, [x[:4], x[4:]], variance="ema", include_frozen=True)
        torch.testing.assert_close(model[4].running_var, plain[4].running_var)


@pytest.mark.parametrize("cls", OTHERS)
def test_what_only_seems_frozen_bn_is_refused_by_name(cls):
    model = toy(cls)
    state = tensors_of(model)
    with pytest.raises(LayerError, match=f"BN layer '4' is a .*{cls.__name__}, whose own forward is unknown here"):
        bnf.freeze_bn(model)
    assert bnf.describe_bn(model)[1].train_stats == "?"
    torch.testing.assert_close(tensors_of(model), state, rtol=0, atol=0)


def test_layers_of_one_class_that_differ_are_told_apart():
    assert [eps_of(Renamed(3, epsilon)) for epsilon in (0.5, 1e-4, 0.5)] == [0.5, 1e-4, 0.5]

    class Maybe(Detr):
        def __init__(self, channels: int, activation: str = "none") -> None:
            super().__init__(channels)
            self.activation = activation

        def forward(self, x):
            return super().forward(x) if self.activation == "none" else super().forward(x).relu()

    assert bn_class(Maybe(3)).frozen
    assert bn_class(Maybe(3, "relu")) is None
    assert bn_class(Maybe(3)).frozen


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_a_trial_neither_heeds_nor_disturbs_what_is_around_it(context):
    class Fresh(Detr):
        def forward(self, x):
            return super().forward(x + torch.rand(1, device=x.device).item() * 0)

    layer = Fresh(3)
    layer.register_forward_hook(lambda *_: pytest.fail("ran the layer itself"))
    state, drawn = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    with context():
        assert eps_of(layer) == 1e-5
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)


class TestRegisteredWithoutEps:
    class Leaky(Detr):
        def forward(self, x):
            return F.leaky_relu(super().forward(x), 0.1)

    class Saturating(Detr):
        def forward(self, x):
            return torch.tanh(super().forward(x))

    def test_eps_is_found_below_the_tail(self):
        bnf.register_bn_class(self.Leaky, tail=lambda layer, x: F.leaky_relu(x, 0.1), frozen=True)
        model = toy(self.Leaky).double()
        x = images(4, 12).double()
        model[1].eval()
        wanted = model(x)
        torch.testing.assert_close(bnf.freeze_bn(model)(x), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(bnf.fold_bn(model, x)(x), wanted, rtol=1e-12, atol=1e-12)

    def test_where_none_fits_it_must_be_given(self):
        bnf.register_bn_class(self.Saturating, tail=lambda layer, x: torch.tanh(x), frozen=True)
        model = toy(self.Saturating).double()
        model[1].eval()
        with pytest.raises(
            LayerError, match=r"BN layer '4' is a .*Saturating without an eps.*register_bn_class\(Sat.*eps"
        ):
            bnf.freeze_bn(model)
        assert bnf.describe_bn(model)[1].eps is None
        x = images(4, 12).double()
        wanted = model(x)
        bnf.register_bn_class(self.Saturating, tail=lambda layer, x: torch.tanh(x), frozen=True, eps=1e-5)
        torch.testing.assert_close(bnf.freeze_bn(model)(x), wanted, rtol=1e-12, atol=1e-12)
        assert bnf.describe_bn(model)[1].eps == 1e-5

    def test_a_negative_eps_is_refused(self):
        with pytest.raises(LayerError, match=r"got eps=-1; give what is added"):
            bnf.register_bn_class(Detr, eps=-1)


def local_class(slope: float) -> type[nn.Module]:
    class Local(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * slope

    return Local


def test_local_classes_of_one_name_are_not_confused():
    double, triple = local_class(2), local_class(3)
    assert (double.__module__, double.__qualname__) == (triple.__module__, triple.__qualname__)
    bnf.register_bn_class(double, tail=lambda layer, x: x * 2)
    with pytest.raises(
        LayerError, match="BN layer '4' is a .*Local, is not the class of this name that was registered"
    ):
        bnf.freeze_bn(toy(triple))
    bnf.register_bn_class(triple, tail=lambda layer, x: x * 3)
    for cls, factor in ((double, 2), (triple, 3)):
        assert bn_tail(cls(3))(torch.ones(1)) == factor
        model = toy(cls).eval()
        wanted = model(images(2, 12))
        torch.testing.assert_close(bnf.freeze_bn(model)(images(2, 12)), wanted)


MODULE = """
import torch
from torch import nn

FACTOR = 2

class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * FACTOR

def tail(layer, x):
    return x * 2
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module on disk that can be written anew and loaded again."""
    (tmp_path / "scaled_bn.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("scaled_bn")
    del sys.modules["scaled_bn"]


class TestLoadedAgain:
    def test_old_and_new_layers_are_known(self, module):
        old = toy(module.Scaled).eval()
        bnf.register_bn_class(module.Scaled, tail=lambda layer, x: x * 2)
        importlib.reload(module)
        new = toy(module.Scaled).eval()
        assert type(old[4]) is not type(new[4])
        x = images(2, 12)
        for model in (old, new):
            wanted = model(x)
            torch.testing.assert_close(bnf.freeze_bn(model).train()(x), wanted)
            torch.testing.assert_close(copy.deepcopy(model)(x), wanted)
            assert bnf.describe_bn(bnf.restore_bn(model))[1].train_stats == "batch"

    @pytest.mark.parametrize("change", [("FACTOR = 2", "FACTOR = 3"), ("forward(x) *", "forward(x) +")])
    def test_a_class_that_computes_otherwise_now_is_refused(self, module, change):
        bnf.register_bn_class(module.Scaled, tail=module.tail)
        Path(module.__file__).write_text(MODULE.replace(*change))
        importlib.reload(module)
        with pytest.raises(LayerError, match=r"scaled_bn.Scaled, is not the class of this name that was registered"):
            bnf.freeze_bn(toy(module.Scaled))
        bnf.register_bn_class(module.Scaled, tail=lambda layer, x: x * 3)
        assert bn_tail(module.Scaled(3))(torch.ones(1)) == 3


LOADING = """
import pickle, sys, torch
torch.set_num_threads(1)
import bnfinetune as bnf
from bnfinetune.errors import LayerError
try:
    model, x, wanted = pickle.load(open(sys.argv[1], "rb"))
except LayerError as error:
    print(error)
    raise SystemExit
torch.testing.assert_close(model(x), wanted)
again = bnf.freeze_bn(bnf.restore_bn(model))
torch.testing.assert_close(again(x), wanted)
print(bnf.describe_bn(again)[1].type, "is as it was")
"""


def loaded_elsewhere(file: Path) -> str:
    """What a fresh process says of a pickled model, its forward on an input, and the output to expect."""
    path = f"{file.parent}:{':'.join(sys.path)}"
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(file)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path},
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout


class TestOtherProcesses:
    @pytest.mark.parametrize("fold", [False, True])
    def test_what_is_known_of_a_class_travels_with_its_layers(self, module, tmp_path, fold):
        bnf.register_bn_class(module.Scaled, tail=module.tail)
        model, x = bnf.freeze_bn(toy(module.Scaled).eval()), images(2, 12)
        model = bnf.fold_bn(model, x) if fold else model
        file = tmp_path / "model.pickle"
        file.write_bytes(pickle.dumps((model, x, model(x).detach())))
        assert "Scaled is as it was" in loaded_elsewhere(file)

    def test_a_look_alike_needs_no_registration_there_either(self, tmp_path):
        model, x = bnf.freeze_bn(toy(Detr).eval()), images(2, 12)
        file = tmp_path / "model.pickle"
        file.write_bytes(pickle.dumps((model, x, model(x).detach())))
        assert "Detr is as it was" in loaded_elsewhere(file)

    def test_a_tail_that_cannot_travel_is_named(self, module, tmp_path):
        bnf.register_bn_class(module.Scaled, tail=lambda layer, x: x * 2)
        model, x = bnf.freeze_bn(toy(module.Scaled).eval()), images(2, 12)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
        torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
        file = tmp_path / "model.pickle"
        file.write_bytes(pickle.dumps((model, x, None)))
        said = loaded_elsewhere(file)
        assert "a pickled BN layer is a scaled_bn.Scaled, whose tail could not be pickled" in said
        assert "call register_bn_class(Scaled, tail=...) before loading" in said
