"""One prepared optimizer for the whole run, whatever trains; and optimizers that the loop cannot serve."""

from contextlib import nullcontext

import pytest
import timm
import torch

import bnfinetune as bnf
from bnfinetune.errors import RecipeError, TrainingError
from bnfinetune.recipe import Optim
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.assembly import assemble
from bnfinetune.training.launch import OwnAccelerator, start_accelerator
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.network.optim import build_optimizer, regroup
from tests.training.loop.test_guard import settings
from tests.training.support import write_images, write_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def scaled(monkeypatch):
    """Accelerators scale losses as for fp16, on the CPU and without rounding."""
    start = start_accelerator

    def started(*args, **kwargs):
        accelerator = start(*args, **kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        return accelerator

    monkeypatch.setattr("bnfinetune.training.run.start_accelerator", started)
    monkeypatch.setattr(OwnAccelerator, "autocast", lambda self: nullcontext())


def clipped_norms(monkeypatch):
    norms, clip = [], Trainer._clip

    def noted(self):
        norms.append(float(clip(self)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(Trainer, "_clip", noted)
    return norms


CHANGES = {
    "freeze": {"bn.freeze_after": 0.34},
    "freeze and unfreeze": {"bn.freeze_after": 0.34, "bn.unfreeze_after": 0.67},
    "frozen from the start": {"bn.train_stats": "running", "bn.update_stats": "none", "bn.unfreeze_after": 0.34},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_gradients_are_unscaled_once_after_every_change(name, change, images, tmp_path, monkeypatch, request):
    """Norms under a scaler are those without one."""
    write_weights(tmp_path / "start.safetensors", name)
    options = {"model.name": name, "model.checkpoint": tmp_path / "start.safetensors", "optim.clip_grad": 1.0,
               "train.epochs": 1, "train.batch_size": 6, **CHANGES[change]}  # fmt: skip
    norms = clipped_norms(monkeypatch)
    bnf.finetune("full", **settings(images, tmp_path / "plain", **options))
    plain = norms.copy()
    norms.clear()
    request.getfixturevalue("scaled")
    bnf.finetune("full", **settings(images, tmp_path / "scaled", **options))
    assert norms == pytest.approx(plain, rel=1e-3)
    assert min(norms) > 0.1


def test_gradients_are_unscaled_once_after_a_resume(images, tmp_path, monkeypatch, scaled):
    options = {"optim.clip_grad": 1.0, "checkpoint.every_steps": 1, "checkpoint.keep": 9, "train.epochs": 1}
    norms = clipped_norms(monkeypatch)
    bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    whole = norms.copy()
    norms.clear()
    for state in sorted((tmp_path / "run/checkpoints").iterdir())[1:]:
        state.rename(tmp_path / state.name)
    bnf.finetune("full", **settings(images, tmp_path / "run", **options, **{"train.resume": "auto"}))
    assert norms == whole[1:]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lookahead_adamw", "lamb"])
def test_regrouping_keeps_the_object_and_the_state_of_what_still_trains(name):
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = build_optimizer(model, Optim(name=name, kwargs={"momentum": 0.9} if name == "sgd" else {}))
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    before = optimizer.state_dict()["state"]
    assert before
    bnf.freeze_bn(model)
    regroup(optimizer, model, Optim(name=name, kwargs={"momentum": 0.9} if name == "sgd" else {}))
    frozen = [p for layer in bnf.find_bn_layers(model).values() for p in layer.parameters()]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(optimizer.state_dict()["state"]) == len(before) - len(frozen)
    weights = model.conv1[0].weight if isinstance(model.conv1, torch.nn.Sequential) else model.conv1.weight
    kept = weights.clone()
    optimizer.step()
    assert not torch.equal(kept, weights)


@pytest.mark.parametrize("name", [name for name in timm.optim.list_optimizers() if "hessian" in name])
def test_second_order_optimizers_are_refused_at_once(name, images, tmp_path):
    with pytest.raises(RecipeError, match=f"optim.name={name} needs gradients of gradients"):
        bnf.finetune("full", **settings(images, tmp_path / "run", **{"optim.name": name}))
    assert not (tmp_path / "run").exists()


def test_optimizers_that_need_a_closure_are_refused(monkeypatch):
    monkeypatch.setattr(timm.optim, "create_optimizer_v2", lambda groups, **_: torch.optim.LBFGS(
        [p for group in groups for p in group["params"]]
    ))  # fmt: skip
    with pytest.raises(RecipeError, match="needs a closure that computes the loss again"):
        build_optimizer(timm.create_model("test_resnet"), Optim())


def test_a_step_that_is_none_ends_the_run(images, tmp_path):
    """As an accumulate block of somebody else, open in the run's own state, would make it."""
    recipe = load_recipe("full", settings(images, tmp_path / "run"))
    trainer = assemble(recipe, start_accelerator(), lambda _: None).trainer
    trainer.accelerator.gradient_state.sync_gradients = False
    with pytest.raises(TrainingError, match="the optimizer made no step at update 1"):
        trainer.fit(lambda *, evaluate: None)
