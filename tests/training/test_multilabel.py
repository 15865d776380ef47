"""Runs on images of any number of labels, from metadata files to predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from timm.data import create_transform, resolve_data_config

import bnfinetune as bnf
from bnfinetune.cli import main
from bnfinetune.errors import RecipeError
from bnfinetune.inference.predict import predict
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.checkup import inspect_checkpoint
from bnfinetune.training.measuring.measure import evaluate_checkpoint
from bnfinetune.training.run import finetune
from tests.training.loop.test_gradients import PLAIN
from tests.training.support import broken_off, exported

NAMES = ("blue", "green", "red")


def write_labelled(folder: Path, counts: dict[str, int]) -> Path:
    """Images with as many brighter channels as they have labels, listed in a metadata file of each split."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        rows = []
        for number in range(count):
            pixels = rng.integers(0, 150, (40, 40, 3), dtype=np.uint8)
            present = rng.random(3) < 0.4
            pixels[..., present] += 50
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
            rows.append(f"{number}.png,{'|'.join(np.array(NAMES)[::-1][present])}")
        (folder / split / "metadata.csv").write_text("\n".join(["file_name,labels", *rows]) + "\n")
    return folder


def truth_of(folder: Path) -> dict[str, list[int]]:
    rows = [line.split(",") for line in (folder / "metadata.csv").read_text().splitlines()[1:]]
    return {name: [int(each in labels.split("|")) for each in NAMES] for name, labels in rows}


def settings(images, folder, **more):
    return {
        "model.name": "test_resnet", "model.pretrained": False, "data.source": str(images), "data.task": "multilabel",
        "data.image_size": 32, "data.workers": 0, "train.epochs": 3, "train.batch_size": 8, "optim.lr": 5e-3,
        "run.dir": str(folder), "run.check": "off", "run.report": False, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("images") / "set", {"train": 32, "val": 23, "test": 13})


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    return bnf.finetune("full", **settings(images, tmp_path_factory.mktemp("runs") / "run", **{"run.report": True}))


@pytest.fixture(scope="module")
def scores(run, images):
    """Probabilities by split and file, of plain timm and PyTorch."""
    model = timm.create_model(f"local-dir:{run.folder / 'best'}", pretrained=True).eval()
    assert tuple(model.pretrained_cfg["label_names"]) == NAMES
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    with torch.no_grad():
        return {
            split: {
                name: model(transform(Image.open(images / split / name).convert("RGB"))[None]).sigmoid()[0].tolist()
                for name in truth_of(images / split)
            }
            for split in ("val", "test")
        }


def test_what_a_run_measures_is_that_of_plain_pytorch(run, images, scores):
    for split, measured in (("val", "validation"), ("test", "test")):
        truth = truth_of(images / split)
        rows = [list(found.values()) for found in (truth, {name: scores[split][name] for name in truth})]
        precisions = [average_precision_score(np.array(rows[0])[:, n], np.array(rows[1])[:, n]) for n in range(3)]
        assert run.after[measured].per_class == pytest.approx(precisions, abs=1e-6)
        assert run.after[measured].map == pytest.approx(np.mean(precisions), abs=1e-6)
    assert max(entry["map"] for entry in run.history) == run.after["validation"].map > run.before["validation"].map
    assert run.after["test"].thresholds == run.after["validation"].thresholds


def test_evaluate_gives_what_the_run_measured(run, capsys):
    measured = evaluate_checkpoint(str(run.folder))
    for split in ("validation", "test"):
        assert measured[split].scalars() == pytest.approx(run.after[split].scalars(), rel=1e-6)
    assert main(["evaluate", f"checkpoint={run.folder}"]) == 0
    assert "mAP" in capsys.readouterr().out


def test_other_data_may_lack_classes_and_has_no_new_ones(run, images, tmp_path, capsys):
    rows = [(images / f"val/{n}.png", "red;blue" if n % 2 else "red") for n in range(6)]
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("\n".join(["file_name,labels", *(f"{path},{labels}" for path, labels in rows)]))
    measured = evaluate_checkpoint(str(run.folder), [f"data.source={tmp_path}"])["all"]
    assert measured.per_class[1] is None
    assert (measured.images, measured.per_class[2]) == (6, 1.0)
    metadata.write_text(metadata.read_text().replace("blue", "violet"))
    assert main(["evaluate", f"checkpoint={run.folder}", f"data.source={tmp_path}"]) == 2
    assert "has the classes red, violet" in capsys.readouterr().err


def test_predictions_are_the_labels_from_their_thresholds_on(run, images, scores, capsys):
    stated = json.loads((run.folder / "best/config.json").read_text())["label_thresholds"]
    assert stated == pytest.approx(run.after["validation"].thresholds, rel=1e-6)
    found = list(predict(str(run.folder), [str(images / "test")], top=2))
    assert len(found) == 13
    counts = set()
    for record in found:
        expected = sorted(zip(scores["test"][Path(record["path"]).name], NAMES, stated, strict=True), reverse=True)
        reached = [(name, p) for p, name, cut in expected if p >= cut]
        assert [each["label"] for each in record["labels"]] == [name for name, _ in reached]
        assert [each["probability"] for each in record["labels"]] == pytest.approx([p for _, p in reached], rel=1e-4)
        assert [each["label"] for each in record["top"]] == [name for _, name, _ in expected[:2]]
        counts.add(len(reached))
    assert len(counts) > 1, "every image has as many labels, which tests little"
    assert main(["predict", f"checkpoint={run.folder}", str(images / "test")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(
        line.count("%") == len(record["labels"]) or "(no label)" in line
        for line, record in zip(lines, found, strict=True)
    )


def test_the_page_has_classes_for_confusion_and_labels_that_are_doubtful(run, images, scores):
    page = (run.folder / "report.html").read_text()
    assert ">Classes<" in page
    assert ">Confusion<" not in page
    assert "mean average precision is" in page
    told = json.loads((run.folder / "report.json").read_text())["most_wrong"]
    expected = []
    for name, flags in truth_of(images / "test").items():
        worst = max(range(3), key=lambda n: abs(scores["test"][name][n] - flags[n]))
        gap = abs(scores["test"][name][worst] - flags[worst])
        if gap > 0.5:
            kind = "missed" if flags[worst] else "taken_for"
            expected.append((1 - gap, f"test/{name}", kind, NAMES[worst]))
    expected.sort()
    assert expected, "no image is wrong, which tests nothing"
    assert [each["likelihood"] for each in told] == pytest.approx([gap for gap, *_ in expected], rel=1e-3)
    for each, (_, name, kind, label) in zip(told, expected, strict=True):
        assert (each["image"], each[kind]) == (name, label)
    assert json.loads((run.folder / "summary.json").read_text())["per_class"].keys() == set(NAMES)


def test_a_run_goes_on_as_if_never_interrupted(images, tmp_path, monkeypatch):
    options = {"data.augment.mixup": 0.4, "train.label_smoothing": 0.1}
    whole = bnf.finetune("full", **settings(images, tmp_path / "whole", **options))
    with broken_off(monkeypatch, 9):
        bnf.finetune("full", **settings(images, tmp_path / "broken", **options))
    again = bnf.finetune("full", **settings(images, tmp_path / "broken", **options, **{"train.resume": "auto"}))
    assert again.history == whole.history
    assert (again.before, again.after) == (whole.before, whole.after)
    first, second = exported(whole.folder / "best"), exported(again.folder / "best")
    assert all(torch.equal(first[key], second[key]) for key in first)


def train(options):
    finetune("freeze_bn", **options)


def test_two_ranks_with_ragged_batches_are_one_process(nursery, tmp_path):
    """15 images in batches of 4: the last is of 3, as 2 + 1; 7 validation images, as 4 + 3."""
    source = write_labelled(tmp_path / "set", {"train": 15, "val": 7})
    one = settings(source, tmp_path / "one", **PLAIN, **{"train.batch_size": 4, "evaluate.every_steps": 2})
    one |= {"optim.lr": 1e-2, "train.epochs": 2}
    two = {**one, "train.batch_size": 2, "run.dir": str(tmp_path / "two")}
    first = bnf.finetune("freeze_bn", **one)
    assert nursery.run(train, two, ranks=2) == [0, 0], nursery.said()
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(first.history, lines, strict=True):
        for key in ("train_loss", "loss", "map", "macro_f1", "images"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    weights = [load_file(tmp_path / name / "best/model.safetensors") for name in ("one", "two")]
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=1e-5, atol=1e-6, msg=key)


def test_a_probe_learns_from_features_as_from_images(images, tmp_path):
    plain = {"data.augment.scale": [1.0, 1.0], "data.augment.ratio": [1.0, 1.0], "data.augment.hflip": 0.0}
    runs = [
        bnf.finetune("linear_probe", **settings(images, tmp_path / kind, **plain, **{"train.cache_features": kind}))
        for kind in ("auto", "off")
    ]
    assert "features  " in (tmp_path / "auto/run.log").read_text()
    first, second = (exported(run.folder / "best") for run in runs)
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-5, msg=key)
    assert runs[0].after["test"].map == pytest.approx(runs[1].after["test"].map)


def test_statistics_computed_at_the_end_have_thresholds_of_their_own(images, tmp_path):
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **{"recalibrate.at": ["end"]}))
    measured = evaluate_checkpoint(str(result.folder))
    assert measured["validation"].scalars() == pytest.approx(result.after["validation"].scalars(), rel=1e-6)
    out = tmp_path / "again"
    assert main(["recalibrate", f"checkpoint={result.folder}", f"out={out}"]) == 0
    configs = [json.loads((each / "config.json").read_text()) for each in (result.folder / "best", out)]
    assert configs[0]["label_thresholds"] == configs[1]["label_thresholds"]


def test_inspect_uses_no_labels(run):
    assert inspect_checkpoint(str(run.folder), images=16).report.running.accuracy is None


def test_a_folder_without_thresholds_says_what_it_predicts_from(run, images, tmp_path, caplog):
    folder = tmp_path / "best"
    folder.mkdir()
    for file in (run.folder / "best").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["label_thresholds"]
    (folder / "config.json").write_text(json.dumps(config))
    assert evaluate_checkpoint(str(folder))["test"].thresholds == (0.5, 0.5, 0.5)
    assert caplog.text.count("a class is predicted from a probability of 0.5 on") == 1


def test_keys_that_do_not_go_with_the_task_are_refused():
    with pytest.raises(RecipeError, match=r"checkpoint.metric=top1 is not measured with data.task=multilabel: choose"):
        load_recipe({}, {"data.task": "multilabel", "checkpoint.metric": "top1"})
    with pytest.raises(RecipeError, match=r"checkpoint.metric=map is not measured with data.task=multiclass: choose"):
        load_recipe({}, {"checkpoint.metric": "map"})
    with pytest.raises(RecipeError, match="evaluate.adapt=tent lowers the entropy of one class per image"):
        load_recipe({}, {"data.task": "multilabel", "evaluate.adapt": "tent"})
