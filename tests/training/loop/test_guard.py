"""Losses and gradients that are not finite: skipped without a trace, by all ranks, and not for ever."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import bnfinetune as bnf
from bnfinetune.errors import TrainingError
from bnfinetune.training.loop.gradients import Gradients
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.saving.states import StateStore
from tests.training.support import before_ending, exported, write_images, write_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def settings(images, folder, **more):
    return {
        "model.name": "test_resnet",
        "model.pretrained": False,
        "data.source": str(images),
        "data.image_size": 32,
        "data.workers": 0,
        "train.epochs": 2,
        "train.batch_size": 6,
        "run.dir": str(folder),
        "run.check": "off",
        "run.report": False,
        **more,
    }


def poison(kind, updates, rank=0):
    """Spoil the loss or one gradient of the given updates on one rank."""
    compute, calls = Gradients.compute, []

    def poisoned(self, forward, *args):
        loss = compute(self, forward, *args)
        calls.append(1)
        if len(calls) in updates and int(os.environ.get("RANK", "0")) == rank:
            if kind == "loss":
                return loss * torch.inf
            next(iter(forward.parameters())).grad[0, 0, 0, 0] = torch.nan
        return loss

    return poisoned


def everything(trainer):
    """Copies of all that an update may change."""
    found = {f"model {key}": value.clone() for key, value in trainer.model.state_dict().items()}
    if trainer.ema is not None:
        found |= {f"ema {key}": value.clone() for key, value in trainer.ema.module.state_dict().items()}
    for number, state in enumerate(trainer.optimizer.state.values()):
        found |= {f"optimizer {number} {key}": value.clone() for key, value in state.items()}
    return found


def differs(before, after, key):
    return key not in before or not torch.equal(before[key], after[key])


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("name", "clip"), [("test_resnet", None), pytest.param("efficientnet_b0", 1.0, marks=pytest.mark.slow)]
)
def test_a_bad_update_changes_nothing(kind, clip, name, images, tmp_path, monkeypatch):
    update, changed = Trainer._update, []

    def compared(self, group):
        before = everything(self)
        update(self, group)
        after = everything(self)
        changed.append({key.split()[0] for key in after if differs(before, after, key)})

    monkeypatch.setattr(Gradients, "compute", poison(kind, {2, 4}))
    monkeypatch.setattr(Trainer, "_update", compared)
    more = {"train.ema": 0.5, "optim.clip_grad": clip, "model.name": name}
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **more))
    every = {"model", "ema", "optimizer"}
    assert changed == [every, set(), every, set(), every, every]
    assert all(record["train_loss"] < 100 for record in result.history)


@pytest.mark.slow
def test_statistics_move_if_they_are_not_rolled_back(images, tmp_path, monkeypatch):
    """What the test above would miss if forwards did not move them."""
    monkeypatch.setattr(Gradients, "compute", poison("loss", {2}))
    monkeypatch.setattr("bnfinetune.training.loop.guard.StepGuard.undo", lambda self, where=None: None)
    update, changed = Trainer._update, []

    def compared(self, group):
        before = everything(self)
        update(self, group)
        after = everything(self)
        changed.append({key.rpartition(".")[2] for key in after if differs(before, after, key)})

    monkeypatch.setattr(Trainer, "_update", compared)
    bnf.finetune("full", **settings(images, tmp_path / "run"))
    assert changed[1] == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("kind", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_too_many_in_a_row_stop_the_run_and_states_from_before_stay(kind, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Gradients, "compute", poison(kind, {1, 3, 4, 5}))
    options = settings(images, tmp_path / "run", **{"train.max_skipped": 3, "checkpoint.every_steps": 1})
    with pytest.raises(TrainingError, match=r"not finite in 3 updates in a row, up to update 5 .*: most likely"):
        bnf.finetune("full", **options)
    state, damaged = StateStore(tmp_path / "run", keep=2).newest()
    assert (state.name, damaged) == ("update-00000002", [])
    monkeypatch.undo()
    lower = {"train.resume": "auto", "optim.lr": 1e-4, "train.resume_allow": ["optim.lr"]}
    assert bnf.finetune("full", **{**options, **lower}).history[-1]["update"] == 6


@pytest.mark.slow
def test_the_cause_is_told_apart(images, tmp_path, monkeypatch):
    write_weights(tmp_path / "start.safetensors", "test_resnet")
    weights = load_file(tmp_path / "start.safetensors")
    endless = {"optim.lr": 1e30, "optim.name": "sgd", "optim.schedule.warmup_fraction": 0.0, "train.epochs": 5}
    with pytest.raises(TrainingError, match=r"loss (nan|inf)\): most likely optim.lr=1e\+30 is too high"):
        bnf.finetune("full", **settings(images, tmp_path / "lr", **endless))
    weights["conv1.0.weight" if "conv1.0.weight" in weights else "conv1.weight"].fill_(torch.nan)
    save_file(weights, tmp_path / "bad.safetensors")
    bad = {"model.checkpoint": tmp_path / "bad.safetensors", "train.epochs": 5}
    with pytest.raises(TrainingError, match=r"no update has ever gone through: .*model.checkpoint"):
        bnf.finetune("freeze_bn", **settings(images, tmp_path / "bad", **bad))


def train_poisoned(options, folder):
    Gradients.compute = poison("loss", {2, 4}, rank=1)

    def record(trainer):
        torch.save(everything(trainer), folder / f"{trainer.accelerator.process_index}.pt")
        assert trainer.progress.skipped == 2

    before_ending(record)
    bnf.finetune("full", **options)


def test_ranks_skip_together(nursery, images, tmp_path):
    options = settings(images, tmp_path / "run", **{"train.batch_size": 3})
    assert nursery.run(train_poisoned, options, tmp_path, ranks=2) == [0, 0], nursery.said()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert all(value.isfinite().all() for value in exported(tmp_path / "run/best").values())
