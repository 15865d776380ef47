"""evaluate and predict from an exported folder alone, as a user calls them, and two ranks by the launcher."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import bnfinetune as bnf
from bnfinetune.cli import main
from bnfinetune.inference.predict import predict
from bnfinetune.training.measuring.measure import evaluate_checkpoint
from tests.training.support import CLASSES, bn_keys, exported, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def result(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {
        "model.name": "bnf_resnet",
        "data.image_size": 32,
        "train.epochs": 4,
        "train.batch_size": 6,
        "data.workers": 0,
    }
    return bnf.finetune("freeze_bn", **{"data.source": images, "run.dir": folder, **options})


def test_evaluate_gives_what_the_run_measured(result):
    for checkpoint in (result.folder, result.folder / "best"):
        measured = evaluate_checkpoint(str(checkpoint))
        assert measured["validation"].confusion == result.after["validation"].confusion
        assert measured["validation"].loss == pytest.approx(result.after["validation"].loss, rel=1e-6)


def test_evaluate_on_other_data_and_refusal_of_other_classes(result, images, tmp_path, capsys):
    other = write_images(tmp_path / "other", val=5)
    assert main(["evaluate", f"checkpoint={result.folder}", f"data.source={other}", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["validation"]["images"] == 15
    (other / "train/blue").rename(other / "train/violet")
    (other / "val/blue").rename(other / "val/violet")
    assert main(["evaluate", f"checkpoint={result.folder}", f"data.source={other}"]) == 2
    captured = capsys.readouterr().err.strip()
    assert captured.count("\n") == 0
    assert "green, red, violet" in captured


def test_predictions_equal_timms_own_pipeline(result, images):
    model = timm.create_model(f"local-dir:{result.folder / 'best'}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    found = list(predict(str(result.folder), [str(images / "val")], top=2))
    assert len(found) == 9
    for record in found:
        with torch.no_grad():
            expected = model(transform(Image.open(record["path"]).convert("RGB"))[None]).softmax(1)[0]
        assert record["label"] == CLASSES[int(expected.argmax())]
        assert record["probability"] == pytest.approx(float(expected.max()), rel=1e-5)
        assert len(record["top"]) == 2


def test_predict_as_json_lines_and_its_errors(result, images, capsys, tmp_path):
    assert main(["predict", f"checkpoint={result.folder}", str(images / "val/red/0.png"), "format=jsonl"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["path"].endswith("0.png")
    for target, message in ((tmp_path / "nowhere", "no file or folder"), (tmp_path, "holds no image")):
        assert main(["predict", f"checkpoint={result.folder}", str(target)]) == 2
        assert message in capsys.readouterr().err
    assert main(["predict", f"checkpoint={tmp_path}", str(images)]) == 2
    assert "holds no exported model" in capsys.readouterr().err


def test_the_launcher_starts_two_ranks_of_which_one_speaks(images, tmp_path):
    options = [
        f"data.source={images}",
        "model.name=bnf_resnet",
        f"run.dir={tmp_path / 'run'}",
        "data.image_size=32",
        "train.epochs=1",
        "train.batch_size=4",
        "data.workers=0",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "bnfinetune", "recipe=freeze_bn", *options],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation after") == 1
    assert "batches of 2 x 4" in done.stdout
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2


def test_exports_load_with_timm_alone(result):
    code = f"""
import sys, timm
model = timm.create_model("local-dir:{result.folder / "best"}", pretrained=True)
assert model.pretrained_cfg["label_names"] == {list(CLASSES)!r}
assert "bnfinetune" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recalibrate_writes_a_new_folder_whose_statistics_are_the_datas(result, tmp_path, capsys):
    before = exported(result.folder / "best")
    words = ["recalibrate", f"checkpoint={result.folder}", f"out={tmp_path / 'new'}"]
    assert main([*words, "recalibrate.data=target"]) == 0
    assert "written to" in capsys.readouterr().out
    after = exported(tmp_path / "new")
    keys = bn_keys("test_resnet")
    assert any(not torch.equal(before[key], after[key]) for key in keys["statistics"])
    assert all(torch.equal(before[key], after[key]) for key in keys["affine"] | keys["other"] | keys["head"])
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("adapt", ["adabn", "mix", "ema", "tent"])
def test_evaluate_adapts_a_copy(adapt, result, capsys):
    plain = evaluate_checkpoint(str(result.folder))["validation"]
    assert main(["evaluate", f"checkpoint={result.folder}", f"adapt={adapt}", "format=json"]) == 0
    adapted = json.loads(capsys.readouterr().out)["validation"]
    assert adapted["images"] == plain.images
    assert adapted["loss"] != plain.loss
    assert evaluate_checkpoint(str(result.folder))["validation"].loss == plain.loss
