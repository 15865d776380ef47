"""Measuring and predicting on whatever a stranger hands in, from the folder of a finished run."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bnfinetune as bnf
from bnfinetune.cli import main
from bnfinetune.errors import DataError
from bnfinetune.inference.predict import predict
from bnfinetune.training.measuring.measure import evaluate_checkpoint, load_exported
from tests.training.support import CLASSES, write_images

OPTIONS = {
    "model.name": "test_resnet", "model.pretrained": False, "data.image_size": 32, "data.workers": 0, "train.epochs": 1,
    "train.batch_size": 4, "run.check": "off", "run.report": False,
}  # fmt: skip


def run(source, folder, **options) -> Path:
    return bnf.finetune("freeze_bn", **{**OPTIONS, "data.source": source, "run.dir": folder, **options}).folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return run(write_images(folder / "images"), folder / "run")


@pytest.fixture
def images(tmp_path):
    """Class folders without splits, 5 images of each class."""
    write_images(tmp_path / "all", train=5, val=1)
    (tmp_path / "all" / "train").rename(tmp_path / "set")
    return tmp_path / "set"


def measured(trained: Path, source: Path, *words: str) -> dict[str, int]:
    found = evaluate_checkpoint(str(trained), [f"data.source={source}", *words])
    return {name: metrics.images for name, metrics in found.items()}


def test_a_set_without_splits_is_measured_as_a_whole(trained, images):
    assert measured(trained, images) == {"all": 15}
    assert measured(trained, images, "data.val_fraction=0.5") == {"all": 15}
    assert measured(trained, images, "data.train_samples=4") == {"all": 15}


@pytest.mark.parametrize("name", ["test", "TEST", "Testing", "test_set"])
def test_a_set_of_a_test_split_alone(trained, images, name):
    (images.parent / "other").mkdir()
    images.rename(images.parent / "other" / name)
    assert measured(trained, images.parent / "other") == {"test": 15}
    assert measured(trained, images.parent / "other", f"data.train_split={name}") == {"test": 15}


def test_all_splits_but_the_training_one_which_is_named(trained, images, tmp_path, caplog):
    for name in ("Train", "Valid", "Test"):
        shutil.copytree(images, tmp_path / "three" / name)
    (tmp_path / "three" / "Test" / "red" / "0.png").unlink()
    assert measured(trained, tmp_path / "three") == {"validation": 15, "test": 14}
    assert caplog.text.count("the split 'Train' is not measured; data.val_split=Train measures it") == 1
    shutil.rmtree(tmp_path / "three" / "Valid")
    assert measured(trained, tmp_path / "three") == {"test": 14}
    assert measured(trained, tmp_path / "three", "data.val_split=Train") == {"validation": 15, "test": 14}


def test_without_a_source_the_runs_own_split_is_measured(trained, tmp_path, images, caplog):
    assert {name: m.images for name, m in evaluate_checkpoint(str(trained)).items()} == {"validation": 9}
    own = run(images, tmp_path / "run", **{"data.val_fraction": 0.4})
    assert {name: m.images for name, m in evaluate_checkpoint(str(own)).items()} == {"validation": 6}
    assert "trained on" not in caplog.text
    assert "is not measured" not in caplog.text
    assert measured(own, images) == {"all": 15}
    assert caplog.text.count("is what the network was trained or recalibrated on") == 1


def test_splits_that_the_run_named_are_not_asked_of_another_set(tmp_path, images):
    folders = write_images(tmp_path / "odd")
    (folders / "val").rename(folders / "tune")
    own = run(folders, tmp_path / "run", **{"data.val_split": "tune", "data.train_samples": 9})
    assert measured(own, images) == {"all": 15}


def test_fewer_classes_are_counted_as_what_they_are(trained, images):
    whole = evaluate_checkpoint(str(trained), [f"data.source={images}"])["all"]
    shutil.rmtree(images / "blue")
    part = evaluate_checkpoint(str(trained), [f"data.source={images}"])["all"]
    assert part.images == 10
    assert part.confusion == ((0, 0, 0), *whole.confusion[1:])
    shutil.rmtree(images / "red")
    assert evaluate_checkpoint(str(trained), [f"data.source={images}"])["all"].confusion[1] == whole.confusion[1]


@pytest.mark.parametrize("order", [("red", "green", "blue"), ("green", "red"), ("blue",)])
@pytest.mark.parametrize("labels", ["ClassLabel", "names", "numbers"])
def test_classes_in_another_order(trained, images, order, labels, tmp_path):
    import datasets

    whole = evaluate_checkpoint(str(trained), [f"data.source={images}"])["all"]
    paths = [path for name in order for path in sorted((images / name).iterdir())]
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths]}
    feature = {
        "ClassLabel": datasets.ClassLabel(names=list(order)),
        "names": datasets.Value("string"),
        "numbers": datasets.Value("int64"),
    }[labels]
    rows["label"] = [path.parent.name if labels == "names" else order.index(path.parent.name) for path in paths]
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    words = [f"data.classes=[{','.join(order)}]"] if labels == "numbers" else []
    found = evaluate_checkpoint(str(trained), [f"data.source={tmp_path / 'x.parquet'}", *words])["all"]
    expected = tuple(row if name in order else (0, 0, 0) for name, row in zip(CLASSES, whole.confusion, strict=True))
    assert found.confusion == expected


def test_a_class_that_the_network_does_not_know_is_refused(trained, images):
    (images / "red").rename(images / "violet")
    with pytest.raises(DataError, match="classes blue, green, violet.* the network predicts blue, green, red"):
        measured(trained, images)


def test_recalibration_on_another_set_uses_all_of_it(trained, images, tmp_path):
    from bnfinetune.training.measuring.recalibrate import recalibrate_checkpoint

    for data in ("train", "target"):
        words = [f"data.source={images}", f"recalibrate.data={data}"]
        assert recalibrate_checkpoint(str(trained), str(tmp_path / data), words).samples == 15


@pytest.fixture
def photos(trained, tmp_path):
    """Ten photos of the validation split, a copy each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        shutil.copy(trained.parent / "images" / "val" / "red" / f"{number % 3}.png", folder / f"{number}.png")
    return folder


def test_predict_goes_on_after_bad_files(trained, photos, caplog):
    (photos / "4.png").write_bytes((photos / "4.png").read_bytes()[:100])
    (photos / "7.png").write_bytes(b"")
    (photos / "8.png").unlink()
    (photos / "8.png").symlink_to(photos / "gone.png")
    found = [Path(record["path"]).name for record in predict(str(trained), [str(photos)])]
    assert found == [f"{number}.png" for number in range(10) if number not in (4, 7, 8)]
    for said in ("cannot read the image", "4.png", "7.png", "2 of 9 images could not be read", "1 links to nothing"):
        assert said in caplog.text


def test_predict_refuses_where_nothing_can_be_read(trained, photos):
    for file in photos.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read the image .*0\.png: .* \(and 9 more, of 10\)"):
        list(predict(str(trained), [str(photos)]))


def test_predict_answers_before_it_has_read_everything(trained, photos, monkeypatch):
    from bnfinetune.inference import inputs as module

    opened = []
    original = module.open_image
    monkeypatch.setattr(
        module, "open_image", lambda raw, *rest, **more: opened.append(raw) or original(raw, *rest, **more)
    )
    answers = predict(str(trained), [str(photos)])
    next(answers)
    assert len(opened) == 1
    assert len(list(answers)) == 9


def test_predict_passes_hidden_files_over(trained, photos, caplog):
    (photos / "._0.png").write_bytes(b"Mac OS X")
    (photos / ".ipynb_checkpoints").mkdir()
    shutil.copy(photos / "0.png", photos / ".ipynb_checkpoints" / "0.png")
    (photos / "back").symlink_to(photos)
    (photos / "notes.txt").touch()
    assert len(list(predict(str(trained), [str(photos)]))) == 10
    assert caplog.text.count("2 hidden, 1 .txt") == 1


def test_predict_prepares_images_as_the_measurement_does(trained, photos):
    model = load_exported(trained / "best")
    found = {record["path"]: record["probability"] for record in predict(str(trained), [str(photos)], top=1)}
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    size = 32 / model.pretrained_cfg["crop_pct"]
    for path, probability in found.items():
        image = Image.open(path).resize((round(size), round(size)), Image.Resampling.BILINEAR)
        edge = (image.width - 32) // 2
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, edge : edge + 32, edge : edge + 32] / 255
        with torch.no_grad():
            expected = model(((pixels - mean) / std)[None]).softmax(1).max()
        assert probability == pytest.approx(float(expected), abs=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_any_channels_trains_measures_predicts_and_loads_again(channels, tmp_path, photos):
    own = run(write_images(tmp_path / "images"), tmp_path / "run", **{"model.kwargs": {"in_chans": channels}})
    assert evaluate_checkpoint(str(own))["validation"].images == 9
    assert len(list(predict(str(own), [str(photos)]))) == 10
    import timm

    model = timm.create_model(f"local-dir:{own / 'best'}", pretrained=True).eval()
    assert model(torch.zeros(1, channels, 32, 32)).shape == (1, 3)
    assert model.pretrained_cfg["input_size"] == (channels, 32, 32)


def test_wide_images_are_read_alike_in_training_measuring_and_prediction(tmp_path):
    ramp = np.linspace(0, 1, 1600).reshape(40, 40)
    for name, top in (("bright", 4095), ("dark", 900)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(8):
            shifted = np.roll(ramp, 5 * number, axis=0)
            Image.fromarray((shifted * top).astype(np.uint16)).save(tmp_path / "set" / name / f"{number}.tif")
    own = run(tmp_path / "set", tmp_path / "run", **{"train.epochs": 3})
    assert json.loads((own / "best" / "statistics.json").read_text())["levels"] == {"integer": [0.0, 4095.0]}
    # 8-bit images of the same look, as an independent oracle
    for file in (tmp_path / "set").rglob("*.tif"):
        small = np.rint(np.asarray(Image.open(file)) / 4095 * 255).astype(np.uint8)
        target = tmp_path / "narrow" / file.parent.name / f"{file.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).save(target)
    wide, narrow = (
        {Path(r["path"]).with_suffix("").name + Path(r["path"]).parent.name: r["probability"]
         for r in predict(str(own), [str(tmp_path / folder)], top=1)}
        for folder in ("set", "narrow")
    )  # fmt: skip
    assert wide == pytest.approx(narrow, abs=1e-6)
    assert measured(own, tmp_path / "set") == {"all": 16}


def test_a_console_that_cannot_show_a_class_name_is_no_end(trained, photos, tmp_path):
    folder = tmp_path / "best"
    shutil.copytree(trained / "best", folder)
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = ["été", "красный", "赤"]
    config["pretrained_cfg"].pop("label_names", None)
    (folder / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "bnfinetune", "predict", f"checkpoint={folder}", str(photos / "0.png")],
        capture_output=True, env={**__import__("os").environ, "PYTHONIOENCODING": "ascii"}, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u8d64" in done.stdout


def test_paths_of_verbs_begin_at_home(trained, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(trained / "best", tmp_path / "nets [1]" / "best")
    words = ["predict", "checkpoint=~/nets [1]", str(photos / "0.png"), "format=jsonl"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["label"] in CLASSES
    out = ["recalibrate", "checkpoint=~/nets [1]", "out=~/new net", f"data.source={trained.parent / 'images'}"]
    assert main(out) == 0
    assert (tmp_path / "new net" / "config.json").is_file()


def test_transformers_loads_an_exported_folder(trained, photos):
    transformers = pytest.importorskip("transformers", reason="transformers is an optional reader of exports")
    model = transformers.AutoModelForImageClassification.from_pretrained(trained / "best").eval()
    own = load_exported(trained / "best")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(images).logits, own(images), atol=1e-6)
    assert tuple(model.config.id2label.values()) == CLASSES


def test_heic_is_read_where_a_plugin_is_installed(trained, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="HEIC needs the extra heif")
    pixels = Image.new("RGB", (64, 64), (200, 30, 40))
    buffer = io.BytesIO()
    pillow_heif.from_pillow(pixels).save(buffer)
    (tmp_path / "IMG_1.HEIC").write_bytes(buffer.getvalue())
    assert len(list(predict(str(trained), [str(tmp_path)]))) == 1
