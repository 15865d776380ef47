"""A linear probe on features computed once is the linear probe on images, for a fraction of the forwards."""

import os
import tempfile

import pytest
import timm
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

import bnfinetune as bnf
from tests.training.support import write_images, write_weights
from tests.training.test_run import last_weights, settings

MODELS = pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
PLAIN = {"data.augment.scale": [1.0, 1.0], "data.augment.ratio": [1.0, 1.0], "data.augment.hflip": 0.0}
OPTIONS = {"optim.name": "sgd", "optim.lr": 1e-2, "evaluate.batch_size": 4, "run.report": False}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def seen(monkeypatch):
    """Images that went through a ResNet, by whether it was training."""
    counts = {True: 0, False: 0}
    network = timm.models.resnet.ResNet
    forward = network.forward_features

    def counting(self, x):
        counts[self.training] += len(x)
        return forward(self, x)

    monkeypatch.setattr(network, "forward_features", counting)
    return counts


def probe(images, folder, name="test_resnet", **more):
    start = folder.parent / f"{name}.safetensors"
    if not start.exists():
        write_weights(start, name)
    options = {"model.name": name, "model.checkpoint": start, **OPTIONS, **more}
    return bnf.finetune("linear_probe", **settings(images, folder, **options))


def assert_alike(folder, other, name="test_resnet"):
    """The classifier has moved alike, and no other parameter has."""
    start = load_file(str(folder.parent / f"{name}.safetensors"))
    one, two = last_weights(folder), last_weights(other)
    assert one.keys() == two.keys() == start.keys()
    moved = [key for key in one if "running" not in key and not torch.equal(one[key], start[key])]
    assert len(moved) == 2
    for key in one:
        move = two[key] - start[key]
        torch.testing.assert_close(one[key] - start[key], move, rtol=0, atol=1e-3 * float(move.abs().max()), msg=key)


@MODELS
@pytest.mark.parametrize("more", [PLAIN, {"train.cache_views": 3}], ids=["plain", "a view for each epoch"])
def test_features_learn_what_images_do(name, more, images, tmp_path):
    result = probe(images, tmp_path / "once", name, **more)
    other = probe(images, tmp_path / "each", name, **more, **{"train.cache_features": "off"})
    assert_alike(tmp_path / "once", tmp_path / "each", name)
    for one, two in zip(result.history, other.history, strict=True):
        assert one["top1"] == two["top1"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    assert type(result.model) is type(timm.create_model(name))
    assert result.after["validation"].loss == pytest.approx(
        min(r["loss"] for r in result.history if r["top1"] == result.after["validation"].top1), rel=1e-3
    )


def test_images_go_through_the_backbone_once(images, tmp_path, seen):
    probe(images, tmp_path / "run", **PLAIN)
    # 18 to train on, 9 to evaluate on, before and after; single ones to see how the network works
    assert seen[True] == 0
    assert 18 + 3 * 9 <= seen[False] <= 18 + 3 * 9 + 8


NOT_ONCE = {
    "augmented": ({}, 54),
    "mixed": (PLAIN | {"data.augment.mixup": 0.5, "train.cache_views": 3}, 54),
    "off": (PLAIN | {"train.cache_features": "off"}, 54),
    "statistics move": (PLAIN | {"bn.train_stats": "batch", "bn.update_stats": "ema"}, 54),
    "re-estimated at each evaluation": (PLAIN | {"recalibrate.at": ["eval"]}, 54),
    "BN learns too": (PLAIN | {"model.trainable": "bn_and_head", "bn.affine": "trained"}, 54),
}


@pytest.mark.parametrize("case", NOT_ONCE)
def test_features_that_change_are_computed_each_time(case, images, tmp_path, seen):
    options, expected = NOT_ONCE[case]
    probe(images, tmp_path / "run", **options)
    assert seen[True] == expected


def test_statistics_computed_anew_at_the_start_are_those_of_the_features(images, tmp_path):
    options = PLAIN | {"recalibrate.at": ["start"]}
    probe(images, tmp_path / "once", **options)
    probe(images, tmp_path / "each", **options, **{"train.cache_features": "off"})
    assert_alike(tmp_path / "once", tmp_path / "each")


def test_more_features_than_memory_go_into_files_and_leave_with_the_run(images, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    probe(images, tmp_path / "once", **PLAIN)
    probe(images, tmp_path / "files", **PLAIN, **{"train.cache_memory": 0})
    assert not any(path.name.startswith("bnfinetune") for path in temporary.iterdir())
    one, two = last_weights(tmp_path / "once"), last_weights(tmp_path / "files")
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def test_kept_features_serve_later_runs_until_anything_changes(tmp_path, seen, monkeypatch):
    monkeypatch.setattr("bnfinetune.training.data.splits._FINGERPRINT_IMAGES", 1)  # which a set of many is like
    images = write_images(tmp_path / "images")
    kept = PLAIN | {"train.cache_dir": str(tmp_path / "features"), "data.fast_decode": False}
    probe(images, tmp_path / "first", **kept)
    first = seen[False]
    probe(images, tmp_path / "second", **kept, **{"optim.lr": 3e-2})
    assert seen[False] == 2 * first - 18
    assert len(list((tmp_path / "features").iterdir())) == 2  # features and labels

    weights = load_file(str(tmp_path / "test_resnet.safetensors"))
    for number, key in enumerate(("layer4.0.conv2.weight", "layer4.0.bn2.running_var"), start=2):
        torch.save({**weights, key: weights[key] * 1.5}, tmp_path / f"{number}.pt")
        probe(images, tmp_path / f"run{number}", **kept, **{"model.checkpoint": tmp_path / f"{number}.pt"})
        assert len(list((tmp_path / "features").iterdir())) == 2 * number
    probe(images, tmp_path / "size", **kept, **{"data.image_size": 40})
    assert len(list((tmp_path / "features").iterdir())) == 8
    next((images / "train" / "red").iterdir()).write_bytes(next((images / "train" / "blue").iterdir()).read_bytes())
    probe(images, tmp_path / "data", **kept)
    assert len(list((tmp_path / "features").iterdir())) == 10


def test_a_probe_goes_on_bit_for_bit(images, tmp_path):
    options = PLAIN | {"checkpoint.every_steps": 1, "checkpoint.keep": 100}
    probe(images, tmp_path / "whole", **options)
    probe(images, tmp_path / "broken", **options)
    for state in sorted((tmp_path / "broken/checkpoints").iterdir())[7:]:
        for path in state.iterdir():
            path.unlink()
        state.rmdir()
    probe(images, tmp_path / "broken", **options, **{"train.resume": "auto"})
    one, two = last_weights(tmp_path / "whole"), last_weights(tmp_path / "broken")
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def run_rank(rank, world, port, images, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")  # fmt: skip
    torch.set_num_threads(1)
    for case, more in {"once": {}, "files": {"train.cache_memory": 0}, "each": {"train.cache_features": "off"}}.items():
        probe(images, folder / case, **PLAIN, **more)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_features(images, tmp_path, free_port):
    write_weights(tmp_path / "test_resnet.safetensors", "test_resnet")
    mp.spawn(run_rank, args=(2, free_port, images, tmp_path), nprocs=2)
    assert_alike(tmp_path / "once", tmp_path / "each")
    assert_alike(tmp_path / "files", tmp_path / "each")
