"""Machines that share no disk: what rank 0 has is enough to train, go on, choose the best and keep features."""

import json
import os
import shutil

import pytest
import torch

import bnfinetune as bnf
from bnfinetune.cli import main
from bnfinetune.training.measuring.measure import evaluate_checkpoint
from tests.training.loop.test_guard import settings
from tests.training.probe.test_features import PLAIN
from tests.training.support import write_images, write_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=8)


def elsewhere(folder):
    """Every rank is on a machine of its own, whose disk holds what the others' does not."""
    rank = os.environ["RANK"]
    (folder / rank).mkdir(exist_ok=True)
    os.chdir(folder / rank)
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")


def train(recipe, options, folder):
    elsewhere(folder)
    result = bnf.finetune(recipe, **options)
    torch.save(result.model.state_dict(), "result.pt")
    (folder / os.environ["RANK"] / "after.json").write_text(json.dumps(result.after["validation"].scalars()))


def settings_of(images, **more):
    keep = {"checkpoint.every_steps": 1, "checkpoint.keep": 20, "train.batch_size": 3, "train.epochs": 1}
    start = {"model.checkpoint": "start.safetensors"}
    return settings(images, "run", **keep, **start, **more)


def same_on_both(folder):
    first, second = (torch.load(folder / rank / "result.pt", weights_only=True) for rank in "01")
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert (folder / "0/after.json").read_text() == (folder / "1/after.json").read_text()
    assert {path.name for path in (folder / "1").iterdir()} == {"result.pt", "after.json"}
    return first


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_training_and_going_on_need_the_disk_of_the_first_rank_alone(name, nursery, images, tmp_path):
    (tmp_path / "0").mkdir()
    write_weights(tmp_path / "0/start.safetensors", name)
    options = settings_of(images, **{"model.name": name, "train.ema": 0.5})
    assert nursery.run(train, "full", options, tmp_path, ranks=2) == [0, 0], nursery.said()
    whole = same_on_both(tmp_path)
    for state in sorted((tmp_path / "0/run/checkpoints").iterdir())[2:]:
        shutil.rmtree(state)
    (tmp_path / "0/run/summary.json").unlink()
    going_on = options | {"train.resume": "auto"}
    assert nursery.run(train, "full", going_on, tmp_path, ranks=2) == [0, 0], nursery.said()
    resumed = same_on_both(tmp_path)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_a_run_on_the_disk_of_another_rank_is_not_begun_anew(nursery, images, tmp_path):
    (tmp_path / "1/run").mkdir(parents=True)
    (tmp_path / "1/run/recipe.yaml").touch()
    words = [*WORDS[:-1], f"data.source={images}", "train.resume=auto"]
    assert nursery.run(command, words, tmp_path, ranks=2, kill_others=False) == [2, 2], nursery.said()
    assert nursery.said().count("process 1 has run on its machine, and process 0 has not") == 2  # once on each machine
    assert not (tmp_path / "0/run").exists()


@pytest.mark.parametrize(
    "more", [{}, {"train.cache_memory": 0}, {"train.cache_dir": "kept"}], ids=["memory", "files", "kept"]
)
def test_features_need_no_common_disk(more, nursery, images, tmp_path):
    (tmp_path / "0").mkdir()
    write_weights(tmp_path / "0/start.safetensors", "test_resnet")
    options = settings_of(images, **PLAIN, **more)
    assert nursery.run(train, "linear_probe", options, tmp_path, ranks=2) == [0, 0], nursery.said()
    once = same_on_both(tmp_path)
    shutil.rmtree(tmp_path / "0/run")
    assert nursery.run(train, "linear_probe", options, tmp_path, ranks=2) == [0, 0], nursery.said()  # with kept ones
    again = same_on_both(tmp_path)
    shutil.rmtree(tmp_path / "0/run")
    each = options | {"train.cache_features": "off"}
    assert nursery.run(train, "linear_probe", each, tmp_path, ranks=2) == [0, 0], nursery.said()
    plain = same_on_both(tmp_path)
    for key in once:
        assert torch.equal(once[key], again[key]), key
        torch.testing.assert_close(once[key], plain[key], rtol=1e-4, atol=1e-6, msg=key)


def command(words, folder):
    elsewhere(folder)
    raise SystemExit(main(words))


WORDS = ["recipe=full", "model.name=test_resnet", "model.pretrained=false", "data.image_size=32", "data.workers=0",
         "train.batch_size=3", "run.check=off", "run.report=false", "run.dir=run", "data.source=images"]  # fmt: skip


@pytest.mark.parametrize("fault", ["missing", "other images"])
def test_images_that_are_not_on_every_machine_are_told_before_training(fault, nursery, images, tmp_path):
    for rank in "01":
        shutil.copytree(images, tmp_path / rank / "images")
    if fault == "missing":
        shutil.rmtree(tmp_path / "1/images")
    else:
        (tmp_path / "1/images/train/red/0.png").unlink()
    codes = nursery.run(command, WORDS, tmp_path, ranks=2, kill_others=False)
    assert codes == [2, 2], nursery.said()
    said = [line for line in nursery.said().splitlines() if line.startswith("bnfinetune: error:")]
    if fault == "missing":
        assert all(line.startswith("bnfinetune: error: [rank 1] data.source") for line in said)
    else:
        assert all("process 1 finds other images in images than process 0" in line for line in said)
    assert len(said) == 2
    assert not (tmp_path / "0/run").exists()


def test_an_error_of_the_first_rank_is_told_once_on_every_machine(nursery, images, tmp_path):
    for rank in "01":
        shutil.copytree(images, tmp_path / rank / "images")
    words = [*WORDS, "model.checkpoint=nowhere.safetensors"]
    assert nursery.run(command, words, tmp_path, ranks=2, kill_others=False) == [2, 2], nursery.said()
    said = [line for line in nursery.said().splitlines() if "nowhere.safetensors" in line]
    assert sorted(line.partition("model.")[0] for line in said) == [
        "bnfinetune: error: ", "bnfinetune: error: [rank 0] ",
    ]  # fmt: skip


@pytest.fixture
def run_of_the_first(nursery, images, tmp_path):
    """A finished run that the first rank's disk alone holds, beside images that lie on both."""
    for rank in "01":
        shutil.copytree(images, tmp_path / rank / "images")
    assert nursery.run(command, [*WORDS, "train.epochs=1"], tmp_path, ranks=2) == [0, 0], nursery.said()
    return tmp_path / "0/run"


def test_verbs_on_checkpoints_need_the_disk_of_the_first_rank_alone(run_of_the_first, nursery, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "0")
    alone = evaluate_checkpoint("run")["validation"]
    words = ["evaluate", "checkpoint=run", "data.source=images", "format=json"]
    assert nursery.run(command, words, tmp_path, ranks=2) == [0, 0], nursery.said()
    said = nursery.said()
    found = json.loads(said[said.index("{") : said.rindex("}") + 1])["validation"]
    assert found["images"] == alone.images
    assert found["loss"] == pytest.approx(alone.loss, rel=1e-6)
    words = ["recalibrate", "checkpoint=run", "out=new", "recalibrate.prior=auto"]
    assert nursery.run(command, words, tmp_path, ranks=2) == [0, 0], nursery.said()
    assert json.loads((tmp_path / "0/new/statistics.json").read_text())["share"] in (0, 0.1, 0.25, 0.5, 0.75, 0.99)
    assert (tmp_path / "0/new/model.safetensors").is_file()
    words = ["predict", "checkpoint=run", "images/val", "format=jsonl"]
    assert nursery.run(command, words, tmp_path, ranks=2) == [0, 0], nursery.said()
    assert nursery.said().count('"probability"') == 9 * 4  # by the first rank alone: of each image, with three classes
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["images"]


@pytest.mark.parametrize("words", [["evaluate"], ["recalibrate", "out=new"]], ids=["evaluate", "recalibrate"])
def test_a_checkpoint_that_the_first_rank_lacks_is_told_once_on_every_machine(words, nursery, tmp_path):
    (tmp_path / "1/run").mkdir(parents=True)
    assert nursery.run(command, [*words, "checkpoint=run"], tmp_path, ranks=2, kill_others=False) == [2, 2]
    said = [line for line in nursery.said().splitlines() if "there is no folder run" in line]
    assert sorted(line.partition("checkpoint:")[0] for line in said) == [
        "bnfinetune: error: ", "bnfinetune: error: [rank 0] ",
    ]  # fmt: skip
