"""The doctor for recipes: silent on the shipped ones, and its fixes are keys that silence it."""

import json
import shlex

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import bnfinetune as bnf
import bnfinetune.demo
from bnfinetune.cli import main
from bnfinetune.demo import load_characters
from bnfinetune.diagnose.set_up import check_set_up
from bnfinetune.recipe_files import load_recipe, shipped_recipes
from bnfinetune.training.checkup import _dry_trainer, check_recipe, inspect_checkpoint
from bnfinetune.training.measuring.prior import read_out
from tests.diagnose.support import codes, the
from tests.training.support import write_images

SHIPPED = sorted(set(shipped_recipes()) - {"auto", "pretrain_characters"})


def judged(name, *overrides):
    trainer = _dry_trainer(load_recipe(name, list(overrides)))
    trainer.loaders.close()
    return check_set_up(trainer.recipe, trainer.model, trainer.optimizer, updates=trainer.updates)


@pytest.mark.parametrize(
    ("code", "name", "overrides"),
    [
        ("BN106", "full", ["bn.momentum=0.0"]),
        ("BN108", "freeze_bn", ["model.pretrained=false"]),
        ("BN202", "full", ["train.steps=8"]),
        ("BN206", "full", ["train.batch_size=2"]),
        ("BN207", "full", ["train.grad_accum=4"]),
        ("BN305", "full", ["model.trainable=head"]),
        ("BN503", "full", ["optim.norm_decay=true"]),
    ],
)
def test_pitfalls_in_recipes_and_their_keys(code, name, overrides):
    fix = the(judged(name, *overrides), code).fix.split()
    assert all("=" in word and "(" not in word for word in fix), "a fix of a recipe is recipe keys"
    assert code not in codes(judged(name, *overrides, *fix))


@pytest.mark.parametrize("name", ["full", "freeze_bn", "bn_only"])
def test_set_ups_of_shipped_recipes_are_sound(name):
    assert not judged(name)


@pytest.mark.parametrize("name", ["adabn", "tent"])
def test_what_trains_nothing_has_no_pitfall_of_training(name):
    overrides = ["train.batch_size=2", "train.grad_accum=4"]
    assert not judged(name, *overrides)
    assert {"BN206", "BN207"} <= codes(judged("full", *overrides))


def test_a_dry_run_of_a_sound_recipe_is_silent_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not check_recipe(load_recipe("freeze_bn", []), steps=2)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_finds_what_the_set_up_does_not_show(tmp_path):
    """Frozen statistics of other data than these."""
    model = timm.create_model("bnf_resnet", pretrained=True)
    for layer in bnf.find_bn_layers(model).values():
        layer.running_mean += 3 * layer.running_var.sqrt()
    save_file(model.state_dict(), tmp_path / "shifted.safetensors")
    overrides = [f"model.checkpoint={tmp_path / 'shifted.safetensors'}", "train.batch_size=16"]
    found = the(check_recipe(load_recipe("freeze_bn", overrides), steps=1), "BN203")
    assert "bn1" in found.where
    assert codes(check_recipe(load_recipe("freeze_bn", [*overrides, found.fix]), steps=1)) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_run_soundly(name):
    found = check_recipe(load_recipe(name, []))
    assert not found, str(found)


def test_a_network_without_batch_norm_has_no_pitfall():
    overrides = ["model.name=test_vit", "model.pretrained=false", "data.image_size=160", "train.batch_size=1"]
    assert not judged("full", *overrides)


def test_inspecting_a_checkpoint(tmp_path):
    model = timm.create_model("bnf_resnet", pretrained=True, num_classes=10)
    digits = [str(digit) for digit in range(10)]
    timm.models.save_for_hf(model, tmp_path / "exported", model_config={"label_names": digits})
    page = tmp_path / "out" / "report.html"
    found = inspect_checkpoint(str(tmp_path / "exported"), ["train.batch_size=8"], images=32, page=page)
    report = found.report
    assert report.images == 32
    assert report.batch_size == 8
    assert report.training_images == 200
    assert report.running.accuracy is not None
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert numbers["images"] == 32
    assert numbers["recommendation"]["command"] == found.advice.command
    assert "statistics against demo" in page.read_text()
    assert str(report) in str(found)
    assert found.advice.command in str(found)
    words = shlex.split(found.advice.command)
    assert words[:3] == ["python", "-m", "bnfinetune"]
    recipe = load_recipe(words[3].removeprefix("recipe="), words[4:])  # every word is a key
    assert recipe.model.name == f"local-dir:{tmp_path / 'exported'}"


def test_an_inspection_goes_on_with_the_same_data_and_tells_of_pitfalls(tmp_path):
    folder = write_images(tmp_path / "images")
    model = timm.create_model("resnet18", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "exported")
    overrides = [f"data.source={folder}", "data.image_size=32", "data.workers=0", "train.batch_size=2"]
    found = inspect_checkpoint(str(tmp_path / "exported"), overrides, images=8)
    words = shlex.split(found.advice.command)
    recipe = load_recipe(words[3].removeprefix("recipe="), words[4:])
    assert (recipe.data.source, recipe.data.image_size) == (str(folder), 32)
    assert recipe.model.name == f"local-dir:{tmp_path / 'exported'}"
    assert "BN206" in codes(found.findings)
    assert found.report.running.accuracy is None  # the network tells no names of classes


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_the_recommended_command_runs_as_printed(name, tmp_path, monkeypatch, capsys):
    """From a folder that timm has saved, of other classes, and from a run of ours."""
    folder = write_images(tmp_path / "some images")
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model(name, num_classes=10), tmp_path / "exported")
    data = [f"data.source={folder}", "data.image_size=32", "train.batch_size=4"]
    monkeypatch.chdir(tmp_path)
    for number, checkpoint in enumerate(("exported", "run0")):
        words = [] if number else data
        capsys.readouterr()
        assert main(["inspect", f"checkpoint={checkpoint}", "images=12", *words]) == 0
        said = capsys.readouterr().out
        assert said.startswith("Statistics of these images ")
        assert "a linear readout of the features has" in said
        command = shlex.split(next(line for line in said.splitlines() if line.startswith("python -m bnfinetune")))
        assert main([*command[3:], "train.epochs=1", f"run.dir=run{number}"]) == 0


def test_a_readout_finds_what_statistics_are_worth(tmp_path):
    """Statistics that hide the classes, those of the images, and a network as it was."""
    model = timm.create_model("bnf_resnet", pretrained=True).eval()
    split = load_characters(train=256, validation=1)["train"].with_format("torch")
    images = torch.stack([image.float() for image in split["image"]]) / 255 * 2 - 1
    batches = list(zip(images.split(64), torch.as_tensor(split["label"][:]).split(64), strict=True))
    accelerator = Accelerator(cpu=True)
    sound = read_out(model, batches, accelerator)
    assert sound.images == 256
    assert not sound.helps
    for layer in bnf.find_bn_layers(model).values():
        layer.running_mean += 3 * layer.running_var.sqrt()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hidden = read_out(model, batches, accelerator)
    assert hidden.helps
    assert hidden.best > 0.9
    assert hidden.scores[1.0] == pytest.approx(sound.scores[1.0], abs=0.05)
    assert "Statistics of these images help, best re-estimated" in hidden.verdict
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
