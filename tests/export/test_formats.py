"""Written networks against the originals, each run by what its users run it with."""

import json
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

import bnfinetune as bnf
from bnfinetune.cli import main
from bnfinetune.errors import CheckpointError, ExportError
from bnfinetune.export import checkpoint
from bnfinetune.export.agreement import compare
from bnfinetune.export.checkpoint import export_checkpoint
from bnfinetune.inference.preprocessing import Preprocessing
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.measuring.measure import load_exported
from tests.inference.folders import write_network
from tests.training.support import CLASSES, write_images
from tests.training.test_multilabel import write_labelled


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Exported folders by architecture, written when they are first asked for."""
    root = tmp_path_factory.mktemp("nets")
    return lambda name, **more: (
        root / name if (root / name).exists() else write_network(root / name, name, **more)
    )  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), train=1, val=2) / "val"


def original(folder, batch):
    with torch.no_grad():
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(batch)


def assert_same_answers(folder, out, photos):
    for first, second in zip(bnf.load(folder).predict(photos), bnf.load(out).predict(photos), strict=True):
        assert (first.path, first.labels) == (second.path, second.labels)
        np.testing.assert_allclose(second.probabilities, first.probabilities, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "inside"),
    [("test_efficientnet", True), pytest.param("test_resnet", False, marks=pytest.mark.slow)],
)
def test_onnx_takes_any_batch_and_is_run_by_predict(name, inside, nets, photos, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs the extra export")
    pytest.importorskip("onnxscript", reason="ONNX needs the extra export")
    onnx = pytest.importorskip("onnx")
    folder, out = nets(name), tmp_path / "out"
    words = ["export", f"checkpoint={folder}", "format=onnx", f"out={out}", "images=20"]
    assert main([*words, "normalisation=inside" if inside else "normalisation=beside"]) == 0
    said = capsys.readouterr().out
    assert "20 images compared" in said
    assert "equal top-1 100.0%" in said
    operators = {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    assert "BatchNormalization" not in operators
    says = json.loads((out / "preprocessing.json").read_text())
    assert (says["format"], says["in_graph"], says["labels"]) == ("onnx", inside, ["blue", "green", "red"])
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    mean, std = (torch.tensor(says[key]).view(3, 1, 1) for key in ("mean", "std"))
    for size in (1, 2, 5):
        values = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
        prepared = (values - mean) / std
        [found] = session.run(["logits"], {"images": (values if inside else prepared).numpy()})
        np.testing.assert_allclose(found, original(folder, prepared).numpy(), atol=2e-5)
    assert_same_answers(folder, out, photos)
    assert main(["predict", f"checkpoint={out}", str(photos), "format=jsonl"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(("name", "inside"), [("test_resnet", True), ("test_efficientnet", False)])
def test_a_program_of_torch_export(name, inside, nets, photos, tmp_path):
    folder, out = nets(name), tmp_path / "out"
    written = export_checkpoint(str(folder), str(out), "torch_export", normalisation_inside=inside, images=8)
    layers = sum("BatchNorm" in type(layer).__name__ for layer in timm.create_model(name).modules())
    assert written.about == {"fused_bn_layers": layers}
    assert written.agreement.relative < 1e-5
    program = torch.export.load(out / "model.pt2")
    targets = {str(node.target) for node in program.graph.nodes}
    assert not {each for each in targets if "batch_norm" in each}
    says = json.loads((out / "preprocessing.json").read_text())
    mean, std = (torch.tensor(says[key]).view(3, 1, 1) for key in ("mean", "std"))
    for size in (1, 3):
        values = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
        prepared = (values - mean) / std
        with torch.no_grad():
            found = program.module()(values if inside else prepared)
        torch.testing.assert_close(found, original(folder, prepared), atol=2e-5, rtol=0)
    assert_same_answers(folder, out, photos)


def test_labels_and_their_thresholds_travel(tmp_path):
    source = write_labelled(tmp_path / "set", {"train": 12, "val": 6})
    cuts = (0.2, 0.5, 0.9)
    folder = write_network(tmp_path / "best", "test_resnet", thresholds=cuts, source=str(source))
    written = export_checkpoint(str(folder), str(tmp_path / "out"), "timm")
    assert (written.agreement.images, written.agreement.answer) == (6, "labels")
    says = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert (tuple(says["thresholds"]), says["output"]["probabilities"]) == (cuts, "sigmoid")
    assert_same_answers(folder, tmp_path / "out", source / "val")


def test_torchvision_takes_resnet18_key_for_key(nets, tmp_path):
    folder, out = nets("resnet18"), tmp_path / "out"
    written = export_checkpoint(str(folder), str(out), "torchvision", images=4)
    assert written.about == {"architecture": "resnet18"}
    model = torchvision.models.resnet18(num_classes=3)
    model.load_state_dict(torch.load(out / "model.pth", weights_only=True))
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(batch), original(folder, batch))
    assert (bnf.load(out).labels, written.agreement.images) == (CLASSES, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mobilenetv3_small_050", r"\d+ tensors do not match those of the nearest, mobilenet_v3_small, such as "),
        ("test_byobnet", "torchvision has no network like|tensors do not match"),
    ],
)
def test_torchvision_refuses_what_it_has_not(name, message, nets, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_checkpoint(str(nets(name)), str(tmp_path / "out"), "torchvision", images=2)
    assert not list(tmp_path.iterdir())


def test_a_timm_folder_is_as_a_run_writes_it(nets, photos, tmp_path):
    folder, out = nets("test_efficientnet"), tmp_path / "out"
    written = export_checkpoint(str(folder), str(out), "timm", images=4)
    assert written.agreement.largest == 0
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(original(out, batch), original(folder, batch))
    for name in ("recipe.yaml", "statistics.json", "model.safetensors"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    first, second = (json.loads((each / "config.json").read_text()) for each in (folder, out))
    assert first == second
    assert_same_answers(folder, out, photos)


def test_a_network_that_computes_something_else_is_not_kept(nets, tmp_path, monkeypatch, caplog):
    fill = checkpoint.fill_as_timm

    def careless(target, model, *rest):
        other = deepcopy(model)
        with torch.no_grad():
            next(other.parameters()).mul_(1.01)
        fill(target, other, *rest)

    monkeypatch.setattr(checkpoint, "fill_as_timm", careless)
    folder, out = str(nets("test_resnet")), tmp_path / "out"
    with pytest.raises(ExportError, match="the written network computes something else: 8 images compared"):
        export_checkpoint(folder, str(out), "timm", images=8)
    assert not list(tmp_path.iterdir())
    written = export_checkpoint(folder, str(out), "timm", images=8, keep_differing=True)
    assert written.agreement.relative > 1e-4
    assert "it is kept as was asked" in caplog.text
    assert (out / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="out: .* is not empty"):
        export_checkpoint(folder, str(out), "timm")


def test_agreement_counts_differences_and_answers(nets):
    network = bnf.load(nets("test_resnet"), device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each) for each in pixels]
    plain = network.scores(pictures)

    class Shifted:
        preprocessing = network.preprocessing

        def scores(self, images):
            found = network.scores(images)
            if len(images) == 1:  # the first image alone
                found = found + torch.nn.functional.one_hot(found.argmin(1), 3) * 100
            return found

    found = compare(network, Shifted(), pictures)
    assert (found.images, found.equal) == (5, 0.8)
    assert found.largest == pytest.approx(100, rel=1e-5)
    assert found.scale == pytest.approx(float(plain.abs().max()), rel=1e-5)
    with pytest.raises(ExportError, match="allowed: 1000 and no other answer"):
        found.require(1000)
    compare(network, network, pictures).require(0)


def test_a_damaged_or_foreign_folder_is_named(nets, tmp_path):
    out, folder = tmp_path, nets("test_resnet")
    says = Preprocessing.of(load_exported(folder), load_recipe(folder / "recipe.yaml"), folder).to_dict()
    (out / "preprocessing.json").write_text(json.dumps(says | {"format": "torch_export"}))
    (out / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model.pt2 cannot be loaded"):
        bnf.load(out)
    (out / "model.pt2").unlink()
    with pytest.raises(CheckpointError, match=r"has lost its network, model.pt2"):
        bnf.load(out)
    (out / "preprocessing.json").write_text(json.dumps(says | {"format": "coreml"}))
    with pytest.raises(CheckpointError, match="states the format 'coreml'"):
        bnf.load(out)
    (out / "preprocessing.json").write_text("{}")
    with pytest.raises(CheckpointError, match="write the folder anew"):
        bnf.load(out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("format=coreml out=x", "format: found 'coreml'; allowed: onnx | torch_export | torchvision | timm"),
        ("out=x", "format= is missing"),
        ("format=onnx", "out= is missing"),
        ("format=timm out=x normalisation=inside", "has no graph to put it into"),
        ("format=onnx out=x tolerance=much", "tolerance: found 'much'; allowed: number >= 0"),
        ("format=onnx out=x images=0", "images: found '0'"),
    ],
)
def test_mistakes_answer_in_one_line(words, message, nets, capsys):
    assert main(["export", f"checkpoint={nets('test_resnet')}", *words.split()]) == 2
    assert message in capsys.readouterr().err
