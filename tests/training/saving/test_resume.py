"""Going on: under which recipe, on which data, with how many ranks, and one run at a time."""

import json
import os
import signal
import time

import pytest
from accelerate import Accelerator

import bnfinetune as bnf
from bnfinetune.errors import CheckpointError, RecipeError
from bnfinetune.recipe_files import diff_recipes, dump_recipe, load_recipe
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.run import finetune
from bnfinetune.training.saving.lock import LOCK, RunLock
from bnfinetune.training.saving.resume import with_saved_choices
from bnfinetune.training.saving.timm_folder import RECIPE
from tests.training.killing import OPTIONS, Kill, train_until
from tests.training.loop.test_guard import settings
from tests.training.support import leave_out_ending, write_images


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", train=8)


def stop_after(monkeypatch, update):
    over = Trainer.is_over.fget
    monkeypatch.setattr(Trainer, "is_over", property(lambda self: over(self) or self.progress.update >= update))
    leave_out_ending(monkeypatch.setattr)


@pytest.fixture
def begun(images, tmp_path, monkeypatch):
    """Options of a run that stopped in its first epoch."""
    options = settings(images, tmp_path / "run", **{"checkpoint.every_steps": 1})
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        finetune("full", **options)
    return {**options, "train.resume": "auto"}


def test_keys_that_may_differ_are_named_each(begun, capsys):
    other = {"optim.lr": 0.5, "optim.schedule.name": "linear"}
    with pytest.raises(CheckpointError, match=r"optim.lr was 0.001 and is 0.5.*name the keys in train.resume_allow"):
        finetune("full", **begun, **other)
    with pytest.raises(CheckpointError, match=r"\(optim.schedule.name was 'cosine' and is 'linear'\)"):
        finetune("full", **begun, **other, **{"train.resume_allow": ["optim.lr"]})
    with pytest.raises(RecipeError, match=r"train.resume_allow: optim.lrr: no such key; did you mean optim.lr\?"):
        finetune("full", **begun, **other, **{"train.resume_allow": ["optim.lrr"]})
    capsys.readouterr()
    result = finetune("full", **begun, **other, **{"train.resume_allow": ["optim"]})
    assert "train.resume_allow: optim.lr, optim.schedule.name differ" in capsys.readouterr().out.replace("\n", " ")
    assert [record["update"] for record in result.history] == [4, 8]


@pytest.mark.slow
def test_what_computes_nothing_may_differ_unnamed(begun, tmp_path):
    (tmp_path / "run").rename(tmp_path / "moved")
    free = {
        "run.dir": str(tmp_path / "moved"),
        "run.report": True,
        "checkpoint.keep": 5,
        "checkpoint.every_steps": 3,
        "checkpoint.every_minutes": 7,
        "train.max_skipped": 3,
        "train.timeout_minutes": 1,
        "data.workers": 1,
    }
    assert len(finetune("full", **{**begun, **free}).history) == 2


@pytest.mark.slow
def test_the_learning_rate_that_was_allowed_is_used(begun, monkeypatch):
    rates = []
    update = Trainer._update

    def noted(self, group):
        rates.append(self.optimizer.param_groups[0]["lr"])
        update(self, group)

    monkeypatch.setattr(Trainer, "_update", noted)
    constant = {"optim.schedule.name": "constant", "optim.schedule.warmup_fraction": 0.0, "optim.lr": 0.25}
    finetune("full", **begun, **constant, **{"train.resume_allow": ["optim"]})
    assert rates == [0.25] * 6


@pytest.mark.slow
def test_other_images_are_refused_unless_allowed(begun, images):
    next((images / "train/red").iterdir()).rename(images / "train/blue/another.png")
    with pytest.raises(CheckpointError, match=r"no longer holds the images that .*resume_allow=\[data.source\]"):
        finetune("full", **begun)
    finetune("full", **begun, **{"train.resume_allow": ["data.source"]})


@pytest.mark.parametrize(
    "kill",
    [Kill("step", 20), *(pytest.param(Kill(phase, 2), marks=pytest.mark.slow) for phase in ("evaluation", "saving"))],
    ids=lambda kill: kill.phase,
)
def test_a_run_killed_before_its_first_state_begins_anew(kill, nursery, images, tmp_path):
    options = {**OPTIONS, "data.source": images, "data.workers": 0, "train.epochs": 1, "run.dir": tmp_path / "run"}
    assert nursery.run(train_until, kill, options) == [-signal.SIGKILL]
    assert not list(tmp_path.glob("run/checkpoints/update-*"))
    assert nursery.run(train_until, None, {**options, "train.resume": "auto"}) == [0], nursery.said()
    assert "begins anew" in nursery.said()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_folder_that_holds_something_else_is_not_taken_for_a_run(images, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").touch()
    with pytest.raises(CheckpointError, match="is not empty"):
        finetune("full", **settings(images, tmp_path / "run", **{"train.resume": "auto"}))


# 24 images: two ranks of 3 with two micro-batches are 12 images per update, as are one of 6 or 4
@pytest.mark.slow
def test_other_ranks_go_on_with_the_same_global_batch(nursery, images, tmp_path):
    options = settings(images, tmp_path / "run", **{"checkpoint.every_steps": 1, "train.epochs": 3})
    two = {"train.batch_size": 3, "train.grad_accum": 2}
    assert nursery.run(train_for, options | two, 3, ranks=2) == [0, 0], nursery.said()
    options["train.resume"] = "auto"
    with pytest.raises(CheckpointError, match=r"by 2 processes with 12 images per update, and this is 1 with 6; keep"):
        finetune("full", **options | two)
    seen = []

    def note(self, group):
        seen.append((self.progress.epoch, self.progress.batch, sum(len(batch[1]) for batch in group)))
        return update(self, group)

    update = Trainer._update
    Trainer._update = note
    try:
        result = finetune("full", **options | {"train.batch_size": 4, "train.grad_accum": 3})
    finally:
        Trainer._update = update
    assert seen == [(1, 3, 12), (2, 0, 12), (2, 3, 12)]  # batches of 4: the second half of the second epoch, the third
    assert [record["update"] for record in result.history] == [2, 4, 6]


def train_for(options, updates):
    over = Trainer.is_over.fget
    Trainer.is_over = property(lambda self: over(self) or self.progress.update >= updates)
    leave_out_ending()
    finetune("full", **options)


def test_a_second_run_in_a_folder_is_refused_and_a_dead_one_is_not_in_the_way(begun, tmp_path):
    run = tmp_path / "run"
    held, hold = os.pipe()
    if (pid := os.fork()) == 0:
        with RunLock() as lock:
            lock.take(run)
            os.write(hold, b"x")
            time.sleep(100)
        os._exit(0)
    os.read(held, 1)
    with pytest.raises(CheckpointError, match=rf"run is in use by process {pid} on .*; wait for that run"):
        finetune("full", **begun)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (run / LOCK).exists()
    assert len(finetune("full", **begun).history) == 2
    assert not (run / LOCK).exists()


def test_a_lock_that_is_released_while_another_waits_for_its_file(tmp_path, monkeypatch):
    """The file is removed between its opening and its locking; the lock must be taken on the new file."""
    opened = os.open

    def raced(path, *args):
        descriptor = opened(path, *args)
        if str(path).endswith(LOCK):
            monkeypatch.undo()
            os.unlink(path)
        return descriptor

    monkeypatch.setattr(os, "open", raced)
    with RunLock() as lock:
        lock.take(tmp_path)
        lock.take(tmp_path)
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_images_left_out_are_listed_over_all_starts(workers, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bnfinetune.training.data.splits.unreadable_images", lambda *_: {})  # as in a set too large
    for name in ("red/1", "blue/2"):
        (images / f"train/{name}.png").write_bytes(b"")
    options = settings(
        images, tmp_path / "run", **{"data.on_error": "skip", "data.workers": workers, "train.epochs": 1}
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        finetune("full", **options, **{"checkpoint.every_steps": 1, "evaluate.every_steps": 1})
    path = tmp_path / "run/unreadable.txt"
    first = path.read_text().splitlines() if path.exists() else []
    capsys.readouterr()
    more = {"checkpoint.every_steps": 1, "evaluate.every_steps": 1, "train.resume": "auto"}
    finetune("full", **options, **more)
    listed = path.read_text().splitlines()
    assert listed[: len(first)] == first
    assert [line for line in listed if "red/1.png" in line or "blue/2.png" in line] == listed
    assert len(listed) == 2
    assert f"2 unreadable images were left out: {path}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_state_says_what_it_is(begun, tmp_path):
    state = json.loads((tmp_path / "run/checkpoints/update-00000002/state.json").read_text())
    fingerprint = state.pop("fingerprint")
    assert len(fingerprint) == 32
    assert state == {"update": 2, "epoch": 0, "ranks": 1, "batch_size": 6, "grad_accum": 1}
    assert bnf.finetune("full", **begun).history


def test_what_a_run_settled_for_itself_holds_when_it_goes_on(tmp_path):
    saved = load_recipe("freeze_bn", {"optim.lr": 0.002, "model.channels_last": False})
    (tmp_path / RECIPE).write_text(dump_recipe(saved))
    going_on = {"run.dir": str(tmp_path), "train.resume": "auto"}
    one, accelerator = load_recipe("freeze_bn", going_on), Accelerator(cpu=True)
    taken = with_saved_choices(one, accelerator)
    assert (taken.optim.lr, taken.model.channels_last) == (0.002, False)
    assert diff_recipes(one, taken).keys() == {"optim.lr", "model.channels_last"}
    given = load_recipe("freeze_bn", going_on | {"optim.lr": 0.1, "model.channels_last": True})
    assert with_saved_choices(given, accelerator) == given
    anew = load_recipe("freeze_bn", {"run.dir": str(tmp_path)})
    assert with_saved_choices(anew, accelerator) == anew
