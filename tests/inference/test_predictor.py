"""`bnf.load` against timm's own pipeline, on files and images from memory, one label and several."""

import csv
import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import bnfinetune as bnf
from bnfinetune.cli import main
from bnfinetune.errors import CheckpointError, DataError
from bnfinetune.inference.rows import as_rows
from tests.inference.folders import write_network
from tests.training.support import CLASSES, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=1, val=3) / "val"


@pytest.fixture(scope="module", params=["test_resnet", "test_efficientnet"])
def folder(request, tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("net") / "best", request.param)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("net") / "best", "test_resnet", thresholds=(0.2, 0.5, 0.9))


def by_timm(folder, path):
    """Scores of a file (classes,), by timm alone."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    with torch.no_grad():
        return model(transform(Image.open(path).convert("RGB"))[None])[0]


def test_probabilities_are_those_of_timms_own_pipeline(folder, images):
    files = sorted(images.rglob("*.png"))
    found = bnf.load(folder).predict(files, batch_size=4)
    assert [each.path for each in found] == [str(file) for file in files]
    for each in found:
        expected = by_timm(folder, each.path).softmax(0).numpy()
        np.testing.assert_allclose(each.probabilities, expected, rtol=1e-4)
        assert each.label == CLASSES[int(expected.argmax())]
        assert each.labels == (each.label,)
        assert each.top(2)[1][1] == pytest.approx(np.sort(expected)[-2], rel=1e-4)


def test_one_path_a_folder_and_images_from_memory_are_the_same(folder, images):
    predictor = bnf.load(str(folder), device="cpu")
    [single] = predictor.predict(str(images / "red" / "0.png"))
    picture = Image.open(images / "red" / "0.png")
    for given in (picture, [picture.convert("RGBA")]):
        [each] = predictor.predict(given)
        assert each.path is None
        assert np.array_equal(each.probabilities, single.probabilities)
    below = predictor.predict([images / "blue", images / "red"])
    assert len(below) == 6
    np.testing.assert_allclose(below[3].probabilities, single.probabilities, rtol=1e-5)
    assert predictor.predict([]) == []


def test_several_labels_have_thresholds_of_their_own(several, images):
    for each in bnf.load(several).predict(images):
        expected = by_timm(several, each.path).sigmoid().numpy()
        np.testing.assert_allclose(each.probabilities, expected, rtol=1e-4)
        assert set(each.labels) == {CLASSES[n] for n in range(3) if expected[n] >= (0.2, 0.5, 0.9)[n]}
        ranked = [label["probability"] for label in each.record()["labels"]]
        assert ranked == sorted(ranked, reverse=True)


def test_wide_images_from_memory_have_the_levels_of_the_network(folder, tmp_path, images):
    values = np.arange(1600, dtype=np.uint16).reshape(40, 40)
    Image.fromarray(values).save(tmp_path / "x.tif")
    statistics = json.loads((folder / "statistics.json").read_text())
    copy = tmp_path / "best"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "statistics.json").write_text(json.dumps({**statistics, "levels": {"integer": [0, 4095]}}))
    predictor = bnf.load(copy)
    narrow = Image.fromarray(np.rint(values / 4095 * 255).astype(np.uint8))  # an oracle of 8 bits
    found = predictor.predict([tmp_path / "x.tif", Image.open(tmp_path / "x.tif"), narrow])
    for each in found[1:]:
        np.testing.assert_allclose(each.probabilities, found[0].probabilities, rtol=1e-5)


def test_what_cannot_be_read_is_raised_or_skipped_and_counted(folder, images, tmp_path, caplog):
    (tmp_path / "bad.png").write_bytes(b"no image")
    mixed = [images / "red" / "0.png", tmp_path / "bad.png", images / "red" / "1.png"]
    predictor = bnf.load(folder)
    with pytest.raises(DataError, match=r"cannot read the image .*bad\.png"):
        predictor.predict(mixed)
    assert not caplog.text
    assert [each.path for each in predictor.predict(mixed, on_error="skip")] == [str(mixed[0]), str(mixed[2])]
    assert caplog.text.count("1 of 3 images could not be read") == 1
    with pytest.raises(DataError, match="cannot read"):
        predictor.predict(mixed[1], on_error="skip")
    with pytest.raises(DataError, match="predict takes paths and Pillow images, not a int"):
        predictor.predict([3])
    with pytest.raises(CheckpointError, match="no folder"):
        bnf.load(tmp_path / "nowhere")


def test_the_verb_ends_at_a_bad_file_where_asked(folder, images, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    words = ["predict", f"checkpoint={folder}", str(tmp_path / "bad.png"), str(images / "red")]
    assert main([*words, "format=csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main([*words, "on_error=raise"]) == 2
    captured = capsys.readouterr()
    assert "cannot read the image" in captured.err
    assert not captured.out


def test_csv_is_read_back_by_a_reader(folder, several, images, capsys):
    assert main(["predict", f"checkpoint={folder}", str(images), "top=2", "format=csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    found = bnf.load(folder).predict(images)
    assert list(rows[0]) == ["path", "label", "probability", "label_1", "probability_1", "label_2", "probability_2"]
    for row, each in zip(rows, found, strict=True):
        assert (row["path"], row["label"]) == (each.path, each.label)
        assert float(row["probability_2"]) == pytest.approx(each.top(2)[1][1], rel=1e-4)
    assert main(["predict", f"checkpoint={several}", str(images), "format=csv"]) == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    for row, each in zip(rows, bnf.load(several).predict(images), strict=True):
        assert tuple(name for name in row["labels"].split("|") if name) == each.labels


def test_a_name_with_commas_and_quotes_stays_one_cell():
    name = 'a, "b"\nc'
    record = {"path": "x,y.png", "label": name, "probability": 0.5, "top": [{"label": name, "probability": 0.5}]}
    [header, row] = csv.reader(io.StringIO("\n".join(as_rows([record], "csv")), newline=""))
    assert dict(zip(header, row, strict=True)) == {
        "path": "x,y.png", "label": name, "probability": "0.5", "label_1": name, "probability_1": "0.5",
    }  # fmt: skip
