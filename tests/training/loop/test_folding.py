"""Runs train folded where statistics are fixed, pause unfolded, and learn what they would learn unfolded."""

import pytest
import timm
import torch
from accelerate import Accelerator
from torch.utils._pytree import tree_structure

import bnfinetune as bnf
from bnfinetune.bn.folding.fold import fold_report
from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.errors import RecipeError
from bnfinetune.training.loop import folding
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.pauses import Pauses
from tests.training.support import broken_off, write_images, write_weights
from tests.training.test_run import last_weights, settings

QUIET = {"run.report": False, "run.check": "off"}
MODELS = pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def folded(monkeypatch):
    """How many layers were folded in each update, and in each pause."""
    seen = {"update": [], "pause": []}

    def watch(cls, name, key, model_of):
        original = getattr(cls, name)

        def watching(self, *args, **kwargs):
            seen[key].append(len(fold_report(model_of(self)).folded))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, watching)

    watch(Trainer, "_update", "update", lambda trainer: trainer.model)
    watch(Pauses, "__call__", "pause", lambda pauses: pauses.trainer.model)
    return seen


def start_of(name, folder):
    write_weights(folder / "start.safetensors", name)
    return {"model.name": name, "model.checkpoint": folder / "start.safetensors"}


def saved_names(folder):
    """What the newest training state holds, by name and not by value."""
    state = max((folder / "checkpoints").iterdir())
    return tree_structure(torch.load(state / "trainer.pt", weights_only=True)), last_weights(folder).keys()


@MODELS
def test_a_folded_run_learns_what_an_unfolded_one_does(name, images, tmp_path, folded, capsys):
    options = start_of(name, tmp_path) | {"optim.name": "sgd", "optim.lr": 1e-3, **QUIET}
    results = {
        fold: bnf.finetune("freeze_stats", **settings(images, tmp_path / fold, **options, **{"bn.fold": fold}))
        for fold in ("always", "off")
    }
    layers = len(find_bn_layers(results["always"].model))
    assert capsys.readouterr().out.count(f"{layers} of {layers} BN layers are computed by the convolutions") == 1
    assert folded["update"] == [layers] * 15 + [0] * 15
    assert not any(folded["pause"])
    assert not fold_report(results["always"].model).folded
    one, other = (last_weights(tmp_path / fold) for fold in results)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)
    assert saved_names(tmp_path / "always") == saved_names(tmp_path / "off")
    metrics = [result.after["validation"] for result in results.values()]
    assert metrics[0].top1 == metrics[1].top1
    assert metrics[0].loss == pytest.approx(metrics[1].loss, rel=1e-3)


@pytest.mark.parametrize(("values", "count"), [(10137, 20), (10138, 0)])
def test_small_batches_are_not_folded_unless_asked(values, count, images, tmp_path, folded, capsys, monkeypatch):
    """Of an image of 32 pixels, resnet18's 20 layers normalise 50,688 values; batches have four images."""
    monkeypatch.setattr(folding, "WORTHWHILE", values)
    with broken_off(monkeypatch, 1):
        bnf.finetune("freeze_stats", **settings(images, tmp_path / "run", **start_of("resnet18", tmp_path), **QUIET))
    assert folded["update"] == [count]
    reason = "not folded into convolutions: 10,138 values per layer and batch are too few"
    assert (reason in capsys.readouterr().out) == (count == 0)


FIXED = {"train_stats": "running", "update_stats": "none", "fold": "always"}
PHASES = {
    "freeze": ({"bn.freeze_after": 2, "bn.fold": "always"}, ["none"] * 10 + ["all"] * 5),
    "unfreeze": ({"bn": [FIXED, {"layers": "layer4*", "unfreeze_after": 0.4}]}, ["all"] * 6 + ["but layer4"] * 9),
    "statistics move": ({"bn.train_stats": "running", "bn.fold": "always"}, ["none"] * 15),
    "off": ({"bn": [FIXED, {"layers": "bn1", "fold": "off"}]}, ["none"] * 15),
}


@pytest.mark.parametrize("case", PHASES)
def test_what_is_folded_follows_the_phases(case, images, tmp_path, folded):
    options, expected = PHASES[case]
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **options, **QUIET))
    names = list(find_bn_layers(result.model))
    tail = sum(name.startswith("layer4") for name in names)
    counts = {"none": 0, "all": len(names), "but layer4": len(names) - tail}
    assert tail
    assert folded["update"] == [counts[which] for which in expected]
    assert not any(folded["pause"])


@pytest.mark.parametrize("parameterisation", ["separate", "absorbed"])
def test_a_folded_run_goes_on_bit_for_bit(parameterisation, images, tmp_path, monkeypatch):
    options = {"checkpoint.every_steps": 1, "train.ema": 0.9, "evaluate.every_steps": 2, "bn.fold": "always", **QUIET}
    options |= start_of("test_resnet", tmp_path) | {"bn.parameterisation": parameterisation}
    bnf.finetune("freeze_stats", **settings(images, tmp_path / "whole", **options))
    with broken_off(monkeypatch, 4):
        bnf.finetune("freeze_stats", **settings(images, tmp_path / "broken", **options))
    bnf.finetune("freeze_stats", **settings(images, tmp_path / "broken", **options, **{"train.resume": "auto"}))
    one, other = last_weights(tmp_path / "whole"), last_weights(tmp_path / "broken")
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_gradients_through_a_frozen_backbone_are_not_recorded(images, tmp_path, monkeypatch):
    """A linear probe's graph is that of its head, whatever comes before."""
    counts = []
    monkeypatch.setattr(
        Accelerator, "backward", lambda self, loss: (counts.append(nodes(loss.grad_fn)), loss.backward())
    )
    options = {"train.epochs": 1, **QUIET}
    bnf.finetune("linear_probe", **settings(images, tmp_path / "run", **options))
    assert set(counts) == {7}  # share, loss, log-softmax, linear, its transposed weight, two accumulators


def nodes(root) -> int:
    """How many autograd nodes a loss hangs on."""
    seen, left = set(), [root]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return len(seen)


def test_an_absorbed_run_starts_from_the_same_function(images, tmp_path):
    options = start_of("resnet18", tmp_path) | {"train.epochs": 1, "bn.parameterisation": "absorbed", **QUIET}
    plain = {**options, "bn.parameterisation": "separate"}
    absorbed = bnf.finetune("freeze_bn", **settings(images, tmp_path / "absorbed", **options))
    separate = bnf.finetune("freeze_bn", **settings(images, tmp_path / "separate", **plain))
    assert absorbed.before["validation"].loss == pytest.approx(separate.before["validation"].loss, rel=1e-4)
    assert absorbed.after["validation"].loss != pytest.approx(separate.after["validation"].loss, rel=1e-4)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'absorbed' / 'best'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), absorbed.model.eval()(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recalibrate.at": ["end"]}, r"leaves no statistics to change later: unset recalibrate\.at"),
        ({"bn.freeze_after": 1}, r"leaves no statistics to change later: unset bn\.freeze_after"),
        ({"bn.train_stats": "batch"}, r"needs fixed statistics: set bn\.train_stats=running"),
    ],
)
def test_what_cannot_be_absorbed_is_refused(options, message, images, tmp_path):
    with pytest.raises(RecipeError, match=message):
        bnf.finetune("full", **settings(images, tmp_path / "run", **options, **{"bn.parameterisation": "absorbed"}))
