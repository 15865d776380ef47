"""Where a device computes on its own, the host reads nothing back for an update, and all comes out the same to the bit.

A CPU stands in for such a device: what runs ahead there computes the same in the same order.
"""

from collections import Counter

import pytest
import torch

import bnfinetune as bnf
from bnfinetune.bn import StatSnapshot, find_bn_layers
from bnfinetune.errors import TrainingError
from bnfinetune.training.loop import guard, trainer
from bnfinetune.training.loop.gradients import Gradients
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.saving.states import StateStore
from tests.bn.models import BACKBONES, backbone
from tests.training.loop.test_guard import poison, settings
from tests.training.support import exported, write_images

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run_ahead(monkeypatch):
    for module in (guard, trainer):
        monkeypatch.setattr(module, "can_run_ahead", lambda device: True)


class Reads:
    """Counts values of tensors that Python asks for while an update is made."""

    def __init__(self, monkeypatch):
        self.counts, self.begun = Counter(), False
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))
        update = Trainer._update
        monkeypatch.setattr(Trainer, "_update", lambda trainer, group: self.watch(update, trainer, group))

    def watch(self, update, trainer, group):
        self.begun = trainer.progress.update >= 1  # the first makes what later ones use
        update(trainer, group)
        self.begun = False

    def counted(self, name, read):
        def reads(tensor, *args, **kwargs):
            if self.begun:
                self.counts[name] += 1
            return read(tensor, *args, **kwargs)

        return reads


OPTIMIZERS = {
    "adamw": {},
    "adam, clipped": {"optim.name": "adam", "optim.clip_grad": 0.5},
    "sgd with momentum": {"optim.name": "sgd", "optim.lr": 0.01},
    "nothing to guard": {"bn.update_stats": "none", "bn.train_stats": "running"},
}


def trained(images, folder, monkeypatch, bad, options):
    monkeypatch.setattr(Gradients, "compute", poison(*bad))
    result = bnf.finetune("full", **settings(images, folder, **{"checkpoint.every_steps": 3, **options}))
    saved = torch.load(StateStore(folder, keep=2).newest()[0] / "trainer.pt", weights_only=True)
    moments = [saved["optimizer"]["state"][number] for number in sorted(saved["optimizer"]["state"])]
    return exported(folder / "best"), moments, result.history, saved["progress"]


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        (OPTIMIZERS["adamw"], ("loss", {2, 4})),
        (OPTIMIZERS["adam, clipped"], ("gradient", {2, 5})),
        (OPTIMIZERS["sgd with momentum"], ("gradient", {1, 4})),
        (OPTIMIZERS["nothing to guard"], ("loss", {4, 5})),
    ],
    ids=OPTIMIZERS,
)
def test_skipped_updates_leave_the_same_bits(bad, options, images, tmp_path, monkeypatch, request):
    one = trained(images, tmp_path / "waits", monkeypatch, bad, options)
    request.getfixturevalue("run_ahead")
    other = trained(images, tmp_path / "ahead", monkeypatch, bad, options)
    assert one[0].keys() == other[0].keys()
    assert [key for key, value in one[0].items() if not torch.equal(value, other[0][key])] == []
    for first, second in zip(one[1], other[1], strict=True):
        assert all(torch.equal(value, second[key]) for key, value in first.items() if torch.is_tensor(value))
    assert one[2] == other[2]
    clock = {"seconds", "waiting"}
    assert {k: v for k, v in one[3].items() if k not in clock} == {k: v for k, v in other[3].items() if k not in clock}
    assert other[3]["skipped"] == 2


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_update_reads_the_verdict_on_the_one_before_and_nothing_else(
    options, images, tmp_path, monkeypatch, run_ahead
):
    reads = Reads(monkeypatch)
    bnf.finetune("full", **settings(images, tmp_path / "run", **{"train.epochs": 3, **options}))
    # of 9 updates, the first of each epoch have nothing to read; SGD decides on its first one at once
    assert reads.counts == {"tolist": 5 if options.get("optim.name") == "sgd" else 6}


def test_without_running_ahead_each_update_waits_for_its_own(images, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "can_run_ahead", lambda device: False)
    reads = Reads(monkeypatch)
    bnf.finetune("full", **settings(images, tmp_path / "run", **{"train.epochs": 3}))
    assert reads.counts == {"tolist": 8}


@pytest.mark.parametrize(
    "options", [{"train.ema": 0.9}, {"optim.name": "lion"}, {"optim.kwargs": {"foreach": True}}], ids=str
)
def test_what_cannot_be_held_back_is_waited_for(options, images, tmp_path, monkeypatch, run_ahead):
    monkeypatch.setattr(Trainer, "read_judgement", lambda self: None)
    monkeypatch.setattr(Gradients, "compute", poison("gradient", {2}))
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    assert all(value.isfinite().all() for value in exported(result.folder / "best").values())


def test_too_many_in_a_row_stop_the_run_one_update_later(images, tmp_path, monkeypatch, run_ahead):
    monkeypatch.setattr(Gradients, "compute", poison("loss", {1, 3, 4, 5}))
    options = settings(images, tmp_path / "run", **{"train.max_skipped": 3, "checkpoint.every_steps": 1})
    with pytest.raises(TrainingError, match=r"not finite in 3 updates in a row, up to update 5 "):
        bnf.finetune("full", **options)
    state, damaged = StateStore(tmp_path / "run", keep=2).newest()
    assert (state.name, damaged) == ("update-00000002", [])


def test_phases_find_all_updates_written_down_in_order(images, tmp_path, monkeypatch, run_ahead):
    """At an unfreezing SGD has no momentum for what trains anew, and the loop waits again."""
    note, noted = Trainer._note, []
    monkeypatch.setattr(
        Trainer, "_note", lambda self, made, verdict: (noted.append(made.number), note(self, made, verdict))
    )
    monkeypatch.setattr(Gradients, "compute", poison("gradient", {6}))
    phases = {"bn.freeze_after": 0.25, "bn.unfreeze_after": 0.5, "evaluate.every_steps": 12}
    bnf.finetune("full", **settings(images, tmp_path / "run", **{"train.steps": 12, "optim.name": "sgd", **phases}))
    assert noted == list(range(1, 13))


def test_the_loss_of_a_healthy_run_is_never_said_to_be_not_finite(images, tmp_path, capsys, run_ahead):
    bnf.finetune("full", **settings(images, tmp_path / "run", **{"run.log_every": 0.001}))
    said = capsys.readouterr().out
    assert "loss not known yet" in said
    assert "not finite" not in said


def test_weights_that_were_bad_from_the_start_are_blamed(images, tmp_path, monkeypatch, run_ahead):
    monkeypatch.setattr(Gradients, "compute", poison("loss", set(range(1, 9))))
    with pytest.raises(TrainingError, match="no update has ever gone through"):
        bnf.finetune("full", **settings(images, tmp_path / "run", **{"train.max_skipped": 2}))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_scalar_on_the_device_says_whether_to_roll_back(name):
    model = backbone(name)
    layers = find_bn_layers(model).values()
    for layer in layers:
        layer.running_var[0] = torch.nan  # is kept as it is, too
    snapshot = StatSnapshot(model)
    snapshot.take()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(torch.randn(4, 3, 64, 64))
    moved = {key: value.clone() for key, value in model.state_dict().items()}
    for where, expected in ((False, moved), (True, before)):
        snapshot.rollback(torch.tensor(where))
        found = model.state_dict()
        assert all(torch.equal(found[key].nan_to_num(7.0), value.nan_to_num(7.0)) for key, value in expected.items())
    assert any(not torch.equal(before[key].nan_to_num(7.0), moved[key].nan_to_num(7.0)) for key in before)
