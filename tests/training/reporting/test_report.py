"""What a run tells of itself: drift over the run, the worst mistakes, the page."""

import json
import re

import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

import bnfinetune as bnf
from bnfinetune.training.data.reading import Failure
from bnfinetune.training.measuring.drift_meter import DriftMeter
from bnfinetune.training.measuring.measure import load_exported
from bnfinetune.training.measuring.mistakes import Mistakes
from tests.training.support import broken_off, write_images, write_weights

EVIL = "<b onclick=alert(1)>&amp;"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes, of which one has a name that is markup, and files of which one has."""
    folder = write_images(tmp_path_factory.mktemp("images"))
    for split in ("train", "val"):
        (folder / split / "red").rename(folder / split / EVIL)
    (folder / "val" / "blue" / "0.png").rename(folder / "val" / "blue" / f"{EVIL}.png")
    return folder


def settings(images, folder, **more):
    return {
        "data.source": str(images), "data.image_size": 32, "data.workers": 0, "train.epochs": 2, "train.batch_size": 4,
        "run.dir": str(folder), "model.name": "resnet18", "model.pretrained": False, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_weights(folder / "start.safetensors", "resnet18")
    checkpoint = {"model.checkpoint": str(folder / "start.safetensors")}
    return bnf.finetune("full", **settings(images, folder / "run", **checkpoint))


def test_a_run_writes_a_page_with_names_escaped(run):
    page = (run.folder / "report.html").read_text()
    assert EVIL not in page
    assert "&lt;b onclick=alert(1)&gt;&amp;amp;" in page
    assert not re.search(r"<script|(src|href)=\"(?!#|data:)", page)
    for heading in ("Over the run", "Confusion", "BatchNorm statistics", "How it was made"):
        assert f">{heading}<" in page


def test_a_run_can_be_looked_at_as_it_goes_on(images, tmp_path, monkeypatch):
    often = {"run.log_every": 1e-6, "run.track_every": 2, "model.name": "test_resnet", "data.val_split": "val"}
    points = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step=None: points.append((step, set(values))))
    updates = -(-18 // 4)
    with broken_off(monkeypatch, updates + 1):
        bnf.finetune("full", **settings(images, tmp_path / "run", **often))
    page = (tmp_path / "run/report.html").read_text()
    assert f"running, update {updates} of {2 * updates}" in page
    assert ">Over the run<" in page
    assert [step for step, names in points if "update/loss" in names] == [2, 4, updates + 1]
    assert {"update/loss", "update/lr", "update/images_per_second"} in [names for _, names in points]
    assert [step for step, names in points if "top1" in names] == [updates]
    bnf.finetune("full", **settings(images, tmp_path / "run", **often), **{"train.resume": "auto"})
    assert "running, update" not in (tmp_path / "run/report.html").read_text()


def test_no_page_where_none_is_wanted(images, tmp_path):
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **{"train.steps": 1, "run.report": False}))
    assert not list(result.folder.glob("report.*"))
    assert not {"bn_drift", "bn_moved"} & result.history[0].keys()


def test_a_network_without_batch_norm_has_a_page_without_statistics(images, tmp_path):
    options = {"model.name": "test_vit", "data.image_size": 160, "train.steps": 1}
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    page = (result.folder / "report.html").read_text()
    assert ">Confusion<" in page
    assert ">BatchNorm statistics<" not in page
    assert json.loads((result.folder / "report.json").read_text())["bn"] is None


def test_the_mistakes_are_those_of_the_best_network(run, images):
    """Against a pass of plain PyTorch over the files."""
    told = json.loads((run.folder / "report.json").read_text())["most_wrong"]
    network = load_exported(run.folder / "best")
    names = network.pretrained_cfg["label_names"]
    transform = timm.data.create_transform(input_size=(3, 32, 32), **{
        key: network.pretrained_cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")
    })  # fmt: skip
    expected = []
    for path in (images / "val").rglob("*.png"):
        with torch.no_grad():
            shares = network(transform(Image.open(path).convert("RGB"))[None]).softmax(1)[0]
        label = names.index(path.parent.name)
        if int(shares.argmax()) != label:
            expected.append((float(shares[label]), f"{path.parent.name}/{path.name}", names[int(shares.argmax())]))
    assert expected, "the network makes no mistake, which tests nothing"
    expected.sort()
    assert [(each["image"], each["taken_for"]) for each in told] == [(name, taken) for _, name, taken in expected]
    assert [each["likelihood"] for each in told] == pytest.approx([share for share, *_ in expected], rel=1e-4)


def test_drift_and_movement_are_recorded_at_each_evaluation(run):
    records = run.history
    assert all(record["bn_drift"] > 0 and record["bn_moved"] > 0 for record in records)
    numbers = json.loads((run.folder / "report.json").read_text())["bn"]
    assert numbers["images"] == 16
    assert numbers["drift"] == max(layer["drift"] for layer in numbers["layers"].values())


class Planted:
    """Loaders whose sample is given."""

    def __init__(self, images):
        self.stats, self.batch_sampler, self.dataset = self, [[0]], self
        self.images, self.domains = images, None

    def __getitems__(self, picks):
        return self

    def finish(self, images):
        return images


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_the_meter_reads_what_was_planted(name):
    torch.manual_seed(0)
    sample = torch.randn(16, 3, 32, 32)
    model = timm.create_model(name, num_classes=3)
    bnf.precise_bn(model, [sample])
    layers = bnf.find_bn_layers(model)
    meter = DriftMeter(model, Planted(sample), Accelerator(cpu=True), None, 10_000)
    assert meter.start == {"bn_drift": pytest.approx(0, abs=1e-3), "bn_moved": 0}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = list(layers)[len(layers) // 2]
    layers[chosen].running_mean += 2 * (layers[chosen].running_var + layers[chosen].eps).sqrt()
    read = meter.read(model)
    assert read["bn_moved"] == pytest.approx(2, rel=1e-4)
    assert read["bn_drift"] == pytest.approx(2, rel=0.05)  # less the sampling noise of 16 images
    layers[chosen].running_mean.copy_(before[f"{chosen}.running_mean"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_meter_ignores_what_is_not_finite_and_networks_without_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    meter = DriftMeter(model, Planted(torch.randn(4, 3, 8, 8)), Accelerator(cpu=True), None, 10_000)
    model[1].running_mean.fill_(float("nan"))
    assert meter.read(model) == {}
    loaders = Planted(torch.randn(4, 2))
    assert DriftMeter(nn.Linear(2, 2), loaders, Accelerator(cpu=True), None, 10_000).read(model) == {}


def test_unreadable_images_stop_whoever_needs_them_and_not_the_meter():
    model, loaders = nn.Sequential(nn.BatchNorm2d(3)), Planted(torch.randn(4, 3, 8, 8))
    loaders.__class__ = type("Broken", (Planted,), {"__getitems__": lambda *_: Failure("it is not an image")})
    assert DriftMeter(model, loaders, Accelerator(cpu=True), None, 10_000).read(model) == {}


def test_the_worst_mistakes_are_kept_over_batches_and_ranks():
    """Against sorting all images at once."""
    torch.manual_seed(0)
    images, logits = torch.randn(40, 3, 4, 4), torch.randn(40, 5)
    labels, indices = torch.randint(5, (40,)), torch.randperm(40)
    shares = logits.softmax(1)
    wrong = [n for n in range(40) if int(logits[n].argmax()) != int(labels[n])]
    expected = sorted(wrong, key=lambda n: float(shares[n, labels[n]]))[:6]
    kept = Mistakes(6)
    for part in torch.arange(40).split(7):
        kept.add(images[part], logits[part], labels[part], indices[part])
    kept.merge()
    assert [each.number for each in kept.worst] == indices[expected].tolist()
    for each, number in zip(kept.worst, expected, strict=True):
        assert torch.equal(each.image, images[number])
        assert each.predicted == int(logits[number].argmax())
        assert each.confidence == pytest.approx(float(shares[number].max()))
