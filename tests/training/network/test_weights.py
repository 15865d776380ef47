"""Weights in whatever other people's training wrapped them."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.errors import BackboneError, CheckpointError
from bnfinetune.recipe import Model
from bnfinetune.training.network.backbone import build_backbone, input_config

FAMILIES = ("test_resnet", "test_efficientnet")  # plain BatchNorm2d, and fused BatchNormAct2d


def weights(name: str, seed: int = 1, **kwargs) -> dict[str, torch.Tensor]:
    """A network's weights, statistics and counters, all random."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=3, **kwargs)
    for layer in find_bn_layers(model).values():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 1.5)
        layer.num_batches_tracked.fill_(7)
    return {key: value.clone() for key, value in model.state_dict().items()}


def body(tensors: dict) -> dict:
    heads = ("fc.", "classifier.", "head.")
    return {name: value for name, value in tensors.items() if not name.startswith(heads)}


def under(prefix: str, tensors: dict) -> dict:
    return {prefix + name: value for name, value in tensors.items()}


WRAPPINGS = {
    "bare": lambda own, other: own,
    "DDP": lambda own, other: {"state_dict": under("module.", own)},
    "compiled DDP": lambda own, other: {"model": under("_orig_mod.module.", own)},
    "averaged": lambda own, other: {"state_dict": other, "state_dict_ema": own},
    "averaged first": lambda own, other: {"model_ema": own, "model": other},
    "Lightning": lambda own, other: {"state_dict": under("model.", own), "epoch": 3, "hyper_parameters": {"lr": 0.1}},
    "Lightning, two deep": lambda own, other: {
        "state_dict": under("net.backbone.", own) | {"loss.weight": torch.ones(3)}
    },
    "OpenMMLab": lambda own, other: {
        "state_dict": under("backbone.", body(own)) | {"head.fc.weight": torch.ones(5, 9)}
    },
    "MoCo": lambda own, other: {
        "state_dict": under("module.encoder_q.", body(own))
        | under("module.encoder_k.", body(other))
        | {"module.encoder_q.fc.0.weight": torch.ones(9, 9), "module.queue": torch.ones(8, 9)}
    },
    "MoCo, keys first": lambda own, other: {
        "state_dict": under("encoder_k.", body(other)) | under("encoder_q.", body(own))
    },
    "DINO": lambda own, other: {
        "student": under("module.backbone.", body(other)),
        "teacher": under("backbone.", body(own)) | {"head.mlp.0.weight": torch.ones(9, 9)},
    },
    "model_state_dict": lambda own, other: {
        "model_state_dict": own,
        "optimizer_state_dict": {"state": {0: {"step": 1}}},
    },
    "net": lambda own, other: {"net": own, "acc": 94.2},
    "deep": lambda own, other: {"checkpoint": {"weights": {"net": own}}},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_any_wrapping(wrapping, name, tmp_path):
    own, other = weights(name), weights(name, seed=2)
    torch.save(WRAPPINGS[wrapping](own, other), tmp_path / "w.pth")
    model = build_backbone(Model(name=name, checkpoint=str(tmp_path / "w.pth")), ("a", "b", "c"))
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in body(own).items())
    plain = timm.create_model(name, num_classes=3)
    plain.load_state_dict(own)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = plain.eval().forward_features(images)
        assert torch.equal(model.eval().forward_features(images), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_old_files_lack_counters(name, tmp_path):
    own = {key: value for key, value in weights(name).items() if not key.endswith("num_batches_tracked")}
    save_file(own, str(tmp_path / "w.safetensors"))
    model = build_backbone(Model(name=name, checkpoint=str(tmp_path / "w.safetensors")), ("a", "b", "c"))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in own.items())
    assert all(layer.num_batches_tracked == 0 for layer in find_bn_layers(model).values())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("channels", [1, 4])
def test_a_first_convolution_is_fitted_to_other_channels(name, channels, tmp_path):
    own = weights(name)
    torch.save({"state_dict": under("module.", own)}, tmp_path / "w.pth")
    section = Model(name=name, checkpoint=str(tmp_path / "w.pth"), kwargs={"in_chans": channels})
    model = build_backbone(section, ("a", "b", "c"))
    first = model.pretrained_cfg["first_conv"]
    found, stated = model.get_parameter(f"{first}.weight"), own[f"{first}.weight"]
    assert found.shape[1] == channels
    if channels == 1:  # a grey image gives what it gave as three equal channels
        assert torch.allclose(found.sum(1), stated.sum(1), atol=1e-6)


def test_what_lies_beside_is_counted_and_foreign_weights_are_refused(tmp_path, caplog):
    own = weights("test_resnet")
    torch.save(
        {"state_dict": under("model.", own) | {"loss.a": torch.ones(1), "loss.b": torch.ones(1)}}, tmp_path / "w.pth"
    )
    build_backbone(Model(name="test_resnet", checkpoint=str(tmp_path / "w.pth")), ("a", "b", "c"))
    assert caplog.text.count("2 tensors of no layer here are passed over, such as loss.a") == 1
    for name, content, said in (
        ("other", {"state_dict": under("model.", weights("test_efficientnet"))}, "is model.name right"),
        ("half", {"net": dict(list(own.items())[:40])}, "lacks .* such"),
        ("shape", {"net": own | {"bn1.weight": torch.ones(3)}}, r"another shape of bn1.weight \(\[3\], not \[\d+\]\)"),
        ("more", own | {"more": torch.ones(1)}, "has unknown more"),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match=said):
            build_backbone(Model(name="test_resnet", checkpoint=str(tmp_path / f"{name}.pth")), ("a", "b", "c"))


def test_a_folder_names_the_file_in_it(tmp_path):
    (tmp_path / "best").mkdir()
    save_file(weights("test_resnet"), str(tmp_path / "best" / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"it is a folder; name .*best/model.safetensors"):
        build_backbone(Model(name="test_resnet", checkpoint=str(tmp_path)), ("a", "b", "c"))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"features_only": True}, r"model\.kwargs\.features_only: a network without a classifier"),
        ({"num_classes": 3}, r"model\.kwargs\.num_classes: the classes of the data decide"),
        ({"num_classes": 0}, r"model\.kwargs\.num_classes"),
        ({"global_pool": ""}, "gives no score per class"),
        ({"pretrained": True}, r"model\.kwargs\.pretrained: model\.pretrained decides"),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_arguments_that_change_the_output_are_refused_in_a_line(name, kwargs, said):
    with pytest.raises(BackboneError, match=said) as caught:
        build_backbone(Model(name=name, pretrained=False, kwargs=kwargs), ("a", "b", "c"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kwargs", [{"global_pool": "max"}, {"drop_rate": 0.5}, {"in_chans": 1}])
def test_other_arguments_are_welcome_and_leave_the_statistics_alone(kwargs):
    model = build_backbone(Model(name="test_resnet", pretrained=False, kwargs=kwargs), ("a", "b", "c"))
    assert all(layer.num_batches_tracked == 0 and layer.training for layer in find_bn_layers(model).values())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_preprocessing_has_the_channels_of_the_network(channels):
    model = timm.create_model("resnet18", in_chans=channels)
    config = input_config(model, 64)
    assert config["input_size"] == (channels, 64, 64)
    assert len(config["mean"]) == len(config["std"]) == channels
    if channels == 1:
        assert config["mean"][0] == pytest.approx(sum((0.485, 0.456, 0.406)) / 3)
