"""Out of memory: told with the keys that help, or met by smaller pieces of the same batch."""

import os

import pytest
import timm
import torch
from safetensors.torch import load_file

import bnfinetune as bnf
from bnfinetune.errors import RecipeError, TrainingError
from bnfinetune.training.loop.memory import is_out_of_memory
from tests.training.loop.test_guard import settings
from tests.training.support import write_images, write_weights
from tests.training.test_run import last_weights

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.7 GiB.")
HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def small_memory(monkeypatch, most, error=GPU, *, training=True):
    """Let forwards of more than `most` images fail."""
    forward = timm.models.ResNet.forward

    def limited(self, x):
        if self.training == training and len(x) > most:
            raise error
        return forward(self, x)

    monkeypatch.setattr(timm.models.ResNet, "forward", limited)


@pytest.mark.parametrize(
    "error", [GPU, *(pytest.param(each, marks=pytest.mark.slow) for each in (HOST, MemoryError()))]
)
def test_the_message_names_the_batch_and_the_ways_out(error, images, tmp_path, monkeypatch):
    small_memory(monkeypatch, 4, error)
    said = r"^out of memory with train.batch_size=6 per process: lower it and raise train.grad_accum .*train.auto_batch"
    with pytest.raises(TrainingError, match=said):
        bnf.finetune("freeze_bn", **settings(images, tmp_path / "run"))


@pytest.mark.slow
def test_evaluation_names_its_own_batch(images, tmp_path, monkeypatch):
    small_memory(monkeypatch, 4, training=False)
    with pytest.raises(TrainingError, match=r"^out of memory with evaluate.batch_size=9 per process: lower it"):
        bnf.finetune("freeze_bn", **settings(images, tmp_path / "run", **{"evaluate.batch_size": 9}))


def test_other_errors_are_left_alone():
    assert is_out_of_memory(GPU)
    assert is_out_of_memory(HOST)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(KeyboardInterrupt())


SAME = {"optim.name": "sgd", "optim.lr": 0.05, "optim.weight_decay": 0.0, "data.augment.mixup": 0.3, "train.ema": 0.5}


def test_smaller_pieces_give_the_gradient_of_the_whole(images, tmp_path, monkeypatch):
    write_weights(tmp_path / "start.safetensors", "test_resnet")
    options = {**SAME, "model.checkpoint": tmp_path / "start.safetensors", "train.grad_accum": 2}
    bnf.finetune("freeze_bn", **settings(images, tmp_path / "whole", **options))
    small_memory(monkeypatch, 2)
    bnf.finetune("freeze_bn", **settings(images, tmp_path / "pieces", **options, **{"train.auto_batch": True}))
    one, other = last_weights(tmp_path / "whole"), last_weights(tmp_path / "pieces")
    assert any(not torch.equal(one[key], value) for key, value in load_file(tmp_path / "start.safetensors").items())
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6)
    state = torch.load(max((tmp_path / "pieces/checkpoints").iterdir()) / "trainer.pt", weights_only=True)
    assert state["progress"]["pieces"] == 4  # 6 images in parts of 2, 2, 1 and 1


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_failed_attempts(images, tmp_path, monkeypatch):
    """With dropout: a run that finds out and one that knows the number of pieces from its state end alike."""
    small_memory(monkeypatch, 3)
    options = {"train.auto_batch": True, "model.kwargs": {"drop_rate": 0.5}, "checkpoint.every_steps": 1}
    bnf.finetune("freeze_bn", **settings(images, tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        patch.setattr(
            "bnfinetune.training.loop.trainer.Trainer.is_over", property(lambda self: self.progress.update >= 3)
        )
        bnf.finetune("freeze_bn", **settings(images, tmp_path / "run", **options))
    (tmp_path / "run/summary.json").unlink()
    bnf.finetune("freeze_bn", **settings(images, tmp_path / "run", **options, **{"train.resume": "auto"}))
    one, other = last_weights(tmp_path / "whole"), last_weights(tmp_path / "run")
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.slow
def test_one_image_that_does_not_fit_ends_the_run(images, tmp_path, monkeypatch):
    small_memory(monkeypatch, 0)
    with pytest.raises(TrainingError, match="down to single images"):
        bnf.finetune("freeze_bn", **settings(images, tmp_path / "run", **{"train.auto_batch": True}))


def test_refused_where_the_network_looks_at_the_batch(images, tmp_path):
    said = r"train.auto_batch=true cannot halve the batch of \d+ BN layers, .*recipe=freeze"
    with pytest.raises(RecipeError, match=said):
        bnf.finetune("full", **settings(images, tmp_path / "run", **{"train.auto_batch": True}))
    assert not (tmp_path / "run").exists()


def train_with_little(options, most):
    """Ranks of different memory: rank r takes `most[r]` images at once."""
    forward = timm.models.ResNet.forward
    mine = most[int(os.environ.get("RANK", "0"))]

    def limited(self, x):
        if self.training and len(x) > mine:
            raise GPU
        return forward(self, x)

    timm.models.ResNet.forward = limited
    bnf.finetune("freeze_bn", **options)


@pytest.mark.slow
def test_ranks_of_different_memory_stay_together(nursery, images, tmp_path):
    write_weights(tmp_path / "start.safetensors", "test_resnet")
    options = {**SAME, "train.ema": None, "data.augment.mixup": 0.0, "train.batch_size": 3,
               "model.checkpoint": tmp_path / "start.safetensors"}  # fmt: skip
    for name, most, automatic in (("whole", (3, 3), False), ("pieces", (1, 3), True)):
        run = settings(images, tmp_path / name, **options, **{"train.auto_batch": automatic})
        assert nursery.run(train_with_little, run, most, ranks=2) == [0, 0], nursery.said()
    one, other = last_weights(tmp_path / "whole"), last_weights(tmp_path / "pieces")
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6)
