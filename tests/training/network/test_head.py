"""A new head's first loss is ln C, in every family of timm that has BN, on every way in."""

import json
import math
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

import bnfinetune as bnf
from bnfinetune.errors import BackboneError
from bnfinetune.recipe import Model
from bnfinetune.training.measuring import measurer
from bnfinetune.training.network.backbone import build_backbone
from bnfinetune.training.network.head import classifier_layers, head_parameters, is_head_zero
from tests.bn.families import FAMILIES, each_family
from tests.training.support import write_images
from tests.training.test_multilabel import settings, write_labelled

CLASSES = (2, 7, 1000)
SPLITS = {"train": 8, "val": 8}
TWO_HEADS, FUSED_HEAD, CONV_HEAD = "efficientformer_l1", "levit_128s", "resnetv2_18"


def save(model: nn.Module, folder, **config):
    """A folder of timm's with a classifier far from zero; its weights file."""
    with torch.no_grad():
        for layer in classifier_layers(model).values():
            layer.weight.normal_()
            layer.bias.normal_()
    save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
    return folder / "model.safetensors"


def names(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def ways_in(name: str, folder) -> Iterator[tuple[str, nn.Module]]:
    """Networks of the same weights, each built in another way, whose heads are new."""
    torch.manual_seed(0)
    drawn = build_backbone(Model(name=name, pretrained=False), names(5))
    yield "random weights", drawn
    file = save(bnf.reset_head(drawn, 5), folder)
    yield "a weights file", build_backbone(Model(name=name, checkpoint=str(file)), names(7))
    yield "a folder", build_backbone(Model(name=f"local-dir:{folder}"), names(1000))


def images_for(model: nn.Module) -> torch.Tensor:
    size, fixed = model.pretrained_cfg["input_size"][-1], model.pretrained_cfg.get("fixed_input_size")
    side = size if fixed else 96
    return torch.randn(2, 3, side, side)


def check(name: str, folder) -> None:
    features = None
    for way, model in ways_in(name, folder):
        with torch.no_grad():
            features = model.eval().forward_features(images_for(model)) if features is None else features
        for classes in (model.num_classes, *CLASSES):
            if model.num_classes != classes:
                bnf.reset_head(model, classes)
            scores = model.forward_head(features)
            assert scores.shape == (2, classes)
            assert is_head_zero(model)
            assert not scores.any()  # so that a run need not measure it
            labels = torch.tensor([0, classes - 1])
            loss = F.cross_entropy(scores, labels)
            assert loss.item() == pytest.approx(math.log(classes), rel=0.05), (way, classes)
            assert F.binary_cross_entropy_with_logits(scores, F.one_hot(labels, classes).float()).item() == (
                pytest.approx(math.log(2), rel=0.05)
            )
            layers = classifier_layers(model).values()
            slopes = torch.autograd.grad(loss, [layer.weight for layer in layers])
            assert all(slope.any() for slope in slopes), (way, classes)


@pytest.mark.parametrize("module", each_family())
def test_a_new_head_begins_at_the_logarithm_of_the_classes(module, tmp_path):
    check(FAMILIES[module].model, tmp_path)


def test_a_network_from_the_hub_begins_there_too(tmp_path, monkeypatch):
    save(timm.create_model("test_resnet", num_classes=5), tmp_path)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    model = build_backbone(Model(name="hf-hub:somebody/network"), names(7))
    assert torch.equal(model.eval()(torch.randn(2, 3, 64, 64)), torch.zeros(2, 7))
    assert torch.equal(model.conv1[0].weight, load_file(str(tmp_path / "model.safetensors"))["conv1.0.weight"])


@pytest.mark.parametrize("name", [FUSED_HEAD, TWO_HEADS, CONV_HEAD, "test_efficientnet"])
def test_what_is_known_of_a_classifier_is_kept(name, tmp_path):
    start = timm.create_model(name, num_classes=5)
    for module in start.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
    file = save(start, tmp_path, label_names=names(5))
    saved, folder = load_file(str(file)), Model(name=f"local-dir:{tmp_path}")
    layers = {f"{layer}.{key}" for layer in classifier_layers(start) for key in ("weight", "bias")}

    def differing(section: Model, classes: list[str], rows: list[int]) -> set[str]:
        state = build_backbone(section, classes).state_dict()
        return {key for key in saved if not torch.equal(state[key], saved[key][rows] if key in layers else saved[key])}

    chosen = ["class 3", "class 0"]
    assert differing(folder, chosen, [3, 0]) == set()
    assert differing(Model(name=name, checkpoint=str(file)), list("abcde"), list(range(5))) == set()
    for section in (folder, Model(name=name, checkpoint=str(file))):
        afresh = section.model_copy(update={"head": "new"})
        assert differing(afresh, names(5), list(range(5))) == layers
        assert not any(build_backbone(afresh, names(5)).state_dict()[key].any() for key in layers)
    save_file({key: value for key, value in saved.items() if not key.startswith("head")}, str(file))
    bare = build_backbone(Model(name=name, checkpoint=str(file)), chosen)  # of a body alone
    assert not any(bare.state_dict()[key].any() for key in layers)


def test_the_last_layer_alone_is_zero_and_may_have_been_left_out():
    with torch.device("meta"):
        deep = timm.create_model("caformer_s18")
    assert set(classifier_layers(deep)) == {"head.fc.fc2"}
    model = bnf.reset_head(timm.create_model("test_efficientnet", num_classes=0), 3)
    assert torch.equal(model(torch.randn(2, 3, 64, 64)), torch.zeros(2, 3))
    assert model.num_classes == 3
    with pytest.raises(BackboneError, match="Sequential has no classifier that timm names"):
        bnf.reset_head(nn.Sequential(nn.Linear(2, 2)))


def test_an_auxiliary_classifier_belongs_to_the_head():
    with torch.device("meta"):
        model = timm.create_model("volo_d1_224")
    assert {id(model.head.weight), id(model.aux_head.weight)} <= head_parameters(model)


def test_a_short_configuration_is_filled_up_from_the_architecture(tmp_path):
    save(timm.create_model("test_resnet", num_classes=5), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 5}))
    model = build_backbone(Model(name=f"local-dir:{tmp_path}"), names(7))
    assert model.fc.out_features == 7
    assert not model.fc.weight.any()


def test_runs_begin_there_and_need_no_image_to_know_it(tmp_path, monkeypatch):
    sets = {"multiclass": write_images(tmp_path / "images"), "multilabel": write_labelled(tmp_path / "labels", SPLITS)}
    for task, chance in (("multiclass", math.log(3)), ("multilabel", math.log(2))):
        known = bnf.finetune("full", **settings(sets[task], tmp_path / task, **{"data.task": task, "train.steps": 0}))
        assert known.before["validation"].loss == pytest.approx(chance, rel=1e-6)
        with monkeypatch.context() as patch:
            patch.setattr(measurer, "is_head_zero", lambda _: False)
            more = {"data.task": task, "train.steps": 0}
            measured = bnf.finetune("full", **settings(sets[task], tmp_path / f"{task}-measured", **more))
        assert known.before == measured.before


def test_a_head_is_zero_only_as_a_whole():
    model = timm.create_model("test_resnet", num_classes=3)
    assert not is_head_zero(model)
    assert is_head_zero(bnf.reset_head(model))
    model.fc.bias.data[1] = 1e-9
    assert not is_head_zero(model)
    assert not is_head_zero(torch.nn.Linear(2, 2))  # of which timm does not say what gives the scores
