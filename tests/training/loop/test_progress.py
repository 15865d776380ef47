"""Which network of a run is its best."""

import json
import math

import pytest
import torch

import bnfinetune as bnf
from bnfinetune.errors import TrainingError
from bnfinetune.training.loop.progress import Progress
from bnfinetune.training.loop.trainer import Trainer
from tests.training.loop.test_guard import settings
from tests.training.support import exported, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def best_of(metric, scores):
    """The update of the best network by (value, loss) of one update each, and the stale evaluations at the end."""
    progress = Progress()
    for update, (value, loss) in enumerate(scores, start=1):
        progress.update = update
        progress.take_score(metric, value, loss)
    return progress.best_update, progress.stale


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("metric", "scores", "best", "stale"),
    [
        ("top1", [(1.0, 0.42), (1.0, 0.01), (1.0, 0.2)], 2, 2),  # a tie goes to the lower loss, and is no progress
        ("top1", [(0.5, 0.1), (0.6, 0.9), (0.6, 0.9)], 2, 1),
        ("top1", [(0.9, NAN), (0.1, 2.0)], 2, 0),
        ("top1", [(0.5, 1.0), (0.9, NAN), (0.9, INF)], 1, 2),
        ("loss", [(0.5, 0.5), (NAN, NAN), (0.4, 0.4), (0.45, 0.45)], 3, 1),
        ("ece", [(0.1, 0.5), (0.1, 0.4), (0.2, 0.1)], 2, 2),
        ("macro_f1", [(NAN, 0.1), (0.0, 0.2)], 2, 0),
        ("top1", [(0.5, NAN)], 0, 1),
    ],
)
def test_ties_go_to_the_lower_loss_and_what_is_not_finite_is_never_best(metric, scores, best, stale):
    assert best_of(metric, scores) == (best, stale)


def test_ties_survive_a_resume(images, tmp_path, monkeypatch):
    """`best_loss` is part of a state."""
    options = {"checkpoint.every_steps": 1, "checkpoint.keep": 9, "evaluate.every_steps": 1, "train.epochs": 1}
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    state = torch.load(max((tmp_path / "run/checkpoints").iterdir()) / "trainer.pt", weights_only=True)
    top = max(record["top1"] for record in result.history)
    assert state["progress"]["best_loss"] == min(r["loss"] for r in result.history if r["top1"] == top)


def spoil(monkeypatch, update, what):
    """From an update on, the network gives NaN in evaluation: by a weight, or by a statistic."""
    original = Trainer._count

    def spoiled(self, *args):
        original(self, *args)
        if self.progress.update >= update:
            layer = next(iter(bnf.find_bn_layers(self.model).values()))
            (layer.weight.data if what == "weight" else layer.running_var).fill_(math.nan)

    monkeypatch.setattr(Trainer, "_count", spoiled)


@pytest.mark.parametrize(
    ("what", "eval_stats"),
    [("weight", "running"), ("statistic", "running"), ("statistic", "batch")],  # the last gives finite losses
)
def test_a_network_with_nan_is_never_exported(what, eval_stats, images, tmp_path, monkeypatch):
    spoil(monkeypatch, 2, what)
    options = {"evaluate.every_steps": 1, "train.steps": 3, "bn.train_stats": "batch", "checkpoint.metric": "macro_f1"}
    options["bn.eval_stats"] = eval_stats
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    assert json.loads((tmp_path / "run/summary.json").read_text())["best_update"] == 1
    assert all(value.isfinite().all() for value in exported(tmp_path / "run/best").values())
    assert math.isfinite(result.after["validation"].loss)


def test_a_run_without_any_finite_network_ends_in_an_error(images, tmp_path, monkeypatch):
    spoil(monkeypatch, 1, "statistic")
    options = {"evaluate.every_steps": 1, "train.steps": 1, "bn.train_stats": "batch"}
    with pytest.raises(TrainingError, match="no network that was evaluated has a finite validation loss"):
        bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    assert not (tmp_path / "run/best").exists()
