"""A head that is fitted before training: logistic regression as sklearn has it, on any number of ranks, only once."""

import os

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from sklearn.linear_model import LogisticRegression

import bnfinetune as bnf
from bnfinetune.errors import BackboneError, DataError, RecipeError
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.data.stratify import hold_out
from bnfinetune.training.measuring.measure import load_exported
from bnfinetune.training.probe import head_fit
from tests.training import test_multilabel
from tests.training.support import before_ending, broken_off, write_images, write_weights
from tests.training.test_run import last_weights, settings

CLASSES = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def features(count: int = 90, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Features of another mean and size in every column, and classes that they tell apart in part."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, count)
    values = rng.normal(size=(count, width)) + 0.7 * np.eye(CLASSES, width)[labels]
    return (values * rng.uniform(0.1, 30, width) + rng.normal(size=width) * 50).astype(np.float32), labels


def prepared(values: np.ndarray) -> np.ndarray:
    centred = values.astype(np.float64) - values.astype(np.float64).mean(0)
    return centred / np.sqrt((centred**2).sum(1).mean())


def oracle(values: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, tol=1e-7, max_iter=10_000).fit(values, labels)


def test_the_fit_is_sklearns():
    values, labels = features()
    head, scaled = head_fit.fit(values, labels, CLASSES), prepared(values)
    truth = oracle(scaled, labels, head.strength).predict_proba(scaled)
    found = (torch.from_numpy(values).double() @ head.weight.T + head.bias).softmax(1)
    np.testing.assert_allclose(found.numpy(), truth, atol=1e-4)


def test_the_strength_is_that_of_the_smallest_held_out_loss():
    values, labels = features()
    head, scaled = head_fit.fit(values, labels, CLASSES, seed=3), prepared(values)
    losses = []
    for strength in head_fit.STRENGTHS:
        each = []
        for number in range(5):
            fitted, held = hold_out(labels, 0.2, 3 + number)
            model = oracle(scaled[fitted], labels[fitted], strength)
            each.append(-np.log(model.predict_proba(scaled[held])[np.arange(len(held)), labels[held]]).mean())
        losses.append(np.mean(each))
    assert head.strength == head_fit.STRENGTHS[int(np.argmin(losses))]
    assert head.strength not in (head_fit.STRENGTHS[0], head_fit.STRENGTHS[-1])
    assert head.held_out_loss == pytest.approx(min(losses), rel=1e-3)


def test_classes_of_several_labels_are_fitted_one_by_one():
    values, labels = features()
    several = np.eye(CLASSES, dtype=np.int64)[labels]
    several[::4, 0] = 1
    head, scaled = head_fit.fit(values, several, CLASSES), prepared(values)
    found = (torch.from_numpy(values).double() @ head.weight.T + head.bias).sigmoid().numpy()
    for number in range(CLASSES):
        truth = oracle(scaled, several[:, number], head.strength).predict_proba(scaled)[:, 1]
        np.testing.assert_allclose(found[:, number], truth, atol=1e-4)


def test_a_class_without_images_is_allowed_and_one_image_a_class_is_not():
    values, labels = features(60)
    head = head_fit.fit(values, labels, CLASSES + 1)
    assert head.weight.shape == (CLASSES + 1, 12)
    assert torch.isfinite(head.weight).all()
    with pytest.raises(DataError, match="no class has a second image"):
        head_fit.fit(values[:3], np.arange(3), 3)


def options(images, tmp_path, name: str = "test_resnet", **more) -> dict:
    start = tmp_path / "start.safetensors"
    if not start.exists():
        write_weights(start, name)
    return settings(images, tmp_path / "run", **{"model.name": name, "model.checkpoint": start, **more})


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_update_zero_is_the_probe(name, images, tmp_path, monkeypatch):
    """The network before its first update predicts what sklearn's regression on its features does."""
    seen, fit = {}, head_fit.fit
    monkeypatch.setattr(head_fit, "fit", lambda *args: seen.setdefault("args", args) and fit(*args))
    chosen = options(images, tmp_path, name, **{"train.steps": 0})
    result = bnf.finetune("lp_ft", **chosen)
    values, labels, _, seed = seen["args"]
    assert values.shape[0] == len(labels) == 18
    head = fit(values, labels, CLASSES, seed)
    truth = oracle(prepared(values), labels, head.strength)
    network = load_exported(tmp_path / "run" / "best")
    with torch.no_grad():
        found = network.get_classifier()(torch.from_numpy(values)).softmax(1)
    np.testing.assert_allclose(found.numpy(), truth.predict_proba(prepared(values)), atol=1e-4)
    [first] = result.history
    assert (first["update"], first["top1"]) == (0, result.after["validation"].top1)
    assert first["loss"] == pytest.approx(result.after["validation"].loss, rel=1e-5)
    assert result.before["validation"].loss == pytest.approx(np.log(CLASSES), rel=0.05)


def test_it_is_measured_kept_and_never_fitted_again(images, tmp_path, monkeypatch):
    """A run that goes on from any state gives what it would have given; update 0 is the first evaluation."""
    fits = []
    monkeypatch.setattr(head_fit, "fit", lambda *args, fit=head_fit.fit: fits.append(args) or fit(*args))
    chosen = options(images, tmp_path, **{"train.ema": 0.9, "optim.lr": 1e-2})
    whole = bnf.finetune("lp_ft", **chosen)
    assert [record["update"] for record in whole.history] == [0, 5, 10, 15]
    assert whole.history[0]["loss"] < 0.9 * whole.before["validation"].loss
    for number, update in enumerate((2, 7), start=2):
        chosen["run.dir"] = str(tmp_path / f"broken {update}")
        with broken_off(monkeypatch, update):
            bnf.finetune("lp_ft", **chosen)
        bnf.finetune("lp_ft", **chosen, **{"train.resume": "auto"})
        assert len(fits) == number
        one, other = last_weights(tmp_path / "run"), last_weights(tmp_path / f"broken {update}")
        assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_statistics_computed_anew_come_first(images, tmp_path):
    chosen = options(images, tmp_path, **{"train.steps": 0, "recalibrate.at": ["start"]})
    result = bnf.finetune("lp_ft", **chosen)
    assert result.history[0]["loss"] == pytest.approx(result.after["validation"].loss, rel=1e-5)
    assert result.history[0]["loss"] < 0.9 * np.log(CLASSES)


def test_several_labels_begin_at_the_probe_too(tmp_path):
    source = test_multilabel.write_labelled(tmp_path / "set", {"train": 32, "val": 23})
    result = bnf.finetune("lp_ft", **test_multilabel.settings(source, tmp_path / "run", **{"train.epochs": 1}))
    assert result.before["validation"].loss == pytest.approx(np.log(2), rel=0.05)
    assert [record["update"] for record in result.history] == [0, 4]
    assert np.isfinite(result.history[0]["loss"])


def test_unreadable_images_are_left_out_and_of_a_large_set_a_part_is_taken(tmp_path, monkeypatch, capsys):
    source = write_images(tmp_path / "images")
    monkeypatch.setattr("bnfinetune.training.data.readable._SMALL_IMAGES", 0)  # of a large set headers alone are read
    truncated = next((source / "train" / "red").iterdir())
    truncated.write_bytes(truncated.read_bytes()[:200])
    more = {"train.steps": 0, "data.on_error": "skip"}
    bnf.finetune("lp_ft", **options(source, tmp_path, **more))
    assert "head   fitted to 17 training images" in capsys.readouterr().out
    monkeypatch.setattr(head_fit, "_MOST", 9)
    bnf.finetune(
        "lp_ft", **options(write_images(tmp_path / "whole"), tmp_path, **more, **{"run.dir": tmp_path / "few"})
    )
    assert "head   fitted to 9 training images" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["efficientformer_l1", "resnetv2_18"])
def test_heads_that_are_not_one_linear_layer_are_refused(name, images, tmp_path):
    more = {"model.pretrained": False, "model.checkpoint": None, "data.image_size": 224, "train.steps": 0}
    with pytest.raises(BackboneError, match=f"model.head=fitted: the scores of {name} are not those of one linear"):
        bnf.finetune("lp_ft", **options(images, tmp_path, name, **more))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data.streaming": True, "train.steps": 5}, "of known number and of one domain: unset data.streaming"),
        ({"bn.domains": ["a", "b"]}, "unset bn.domains"),
        ({"bn.freeze_after": 0}, r"use recalibrate.at=\[start\]"),
    ],
)
def test_what_cannot_be_fitted_is_refused_at_once(more, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("lp_ft", more)


def run_rank(rank, world, port, images, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")  # fmt: skip
    torch.set_num_threads(1)
    kept = folder / f"rank {rank}.pt"
    before_ending(lambda trainer: torch.save(trainer.model.get_classifier().state_dict(), kept))
    bnf.finetune("lp_ft", **options(images, folder, **{"train.steps": 0}))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_fit_what_one_does(images, tmp_path, free_port):
    bnf.finetune("lp_ft", **options(images, tmp_path, **{"train.steps": 0, "run.dir": tmp_path / "alone"}))
    mp.spawn(run_rank, args=(2, free_port, images, tmp_path), nprocs=2)
    heads = [torch.load(tmp_path / f"rank {rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = last_weights(tmp_path / "alone")
    for key in ("weight", "bias"):
        assert torch.equal(heads[0][key], heads[1][key])
        torch.testing.assert_close(heads[0][key], alone[f"fc.{key}"], rtol=1e-3, atol=1e-4)
