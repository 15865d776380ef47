"""The embedded backbone: a citizen of timm's registry whose weights are good and whose statistics are honest."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch import nn

from bnfinetune.demo import load_characters, load_digits
from bnfinetune.demo.alphabet import CLASSES
from bnfinetune.demo.backbone import WEIGHTS


@pytest.fixture(scope="module")
def model():
    return timm.create_model("bnf_resnet", pretrained=True).eval()


@pytest.fixture(scope="module")
def characters():
    return load_characters(train=1, validation=245)["validation"]


@pytest.fixture(scope="module")
def digits():
    return load_digits()["validation"]


def batch(model, split):
    transform = create_transform(**resolve_data_config({}, model=model))
    return torch.stack([transform(image.convert("RGB")) for image in split["image"]])


def top1(logits, split):
    return (logits.argmax(dim=1) == torch.tensor(split["label"])).float().mean().item()


def test_timm_lists_the_model_with_its_weights():
    assert "bnf_resnet" in timm.list_models()
    assert timm.list_pretrained("bnf_resnet*") == ["bnf_resnet.characters"]
    assert timm.is_model_pretrained("bnf_resnet")


def test_the_weights_are_small_finite_and_complete(model):
    assert WEIGHTS.stat().st_size <= 2_500_000
    state = load_file(WEIGHTS)
    assert all(tensor.isfinite().all() for tensor in state.values())
    fresh = timm.create_model("bnf_resnet")
    fresh.load_state_dict(state, strict=True)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())


def test_the_architecture_is_timms_own(model):
    """What the exported configuration names must rebuild the very network."""
    twin = timm.create_model(model.pretrained_cfg["architecture"], num_classes=len(CLASSES)).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(twin(images), model(images))


def test_preprocessing_and_class_names_come_with_the_model(model):
    config = resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 32, 32)
    assert config["crop_pct"] == 1.0
    assert model.pretrained_cfg["label_names"] == CLASSES
    assert model.num_classes == len(CLASSES)


def test_another_head_keeps_the_pretrained_body(model):
    adapted = timm.create_model("bnf_resnet", pretrained=True, num_classes=10)
    assert adapted.fc.weight.shape == (10, model.num_features)
    for key, tensor in adapted.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(tensor, model.state_dict()[key]), key


def test_one_input_channel_sums_the_pretrained_filters(model):
    """timm's rule for grey images, which keeps the response to grey colour images."""
    grey = timm.create_model("bnf_resnet", pretrained=True, in_chans=1).eval()
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(grey(images), model(images.expand(-1, 3, -1, -1)), atol=1e-4)


def test_features_only(model):
    features = timm.create_model("bnf_resnet", pretrained=True, features_only=True).eval()
    maps = features(torch.zeros(1, 3, 32, 32))
    assert [tuple(each.shape[1:]) for each in maps] == [
        (channels, 32 // stride, 32 // stride)
        for channels, stride in zip(features.feature_info.channels(), features.feature_info.reduction(), strict=True)
    ]
    assert torch.equal(features.state_dict()["conv1.0.weight"], model.conv1[0].weight)


def test_timms_configuration_arguments_reach_the_model():
    overlaid = timm.create_model("bnf_resnet", pretrained_cfg_overlay={"mean": (0.0, 0.0, 0.0)})
    assert overlaid.pretrained_cfg["mean"] == (0.0, 0.0, 0.0)
    tagged = timm.create_model("bnf_resnet.characters", drop_rate=0.25)
    assert tagged.drop_rate == 0.25


def test_without_pretrained_the_weights_are_random(model):
    assert not torch.equal(timm.create_model("bnf_resnet").conv1[0].weight, model.conv1[0].weight)


@torch.inference_mode()
def test_it_reads_printed_characters_it_never_saw(model, characters):
    assert top1(model(batch(model, characters)), characters) > 0.8


@torch.inference_mode()
def test_it_reads_handwritten_digits_far_better_than_chance_without_training(model, digits):
    assert top1(model(batch(model, digits))[:, :10], digits) > 0.5


@torch.inference_mode()
def test_the_stored_statistics_describe_printed_characters_and_not_digits(model, characters, digits):
    """Distance of a layer's running statistics from those of its input, in units of the running deviation."""
    printed = drift(model, batch(model, characters))
    written = drift(model, batch(model, digits))
    assert printed.max() < 0.2
    assert np.median(written / printed) > 3


def drift(model, images):
    found = []

    def measure(layer, inputs):
        mean = inputs[0].mean(dim=(0, 2, 3))
        found.append(((mean - layer.running_mean) / layer.running_var.sqrt()).square().mean().sqrt().item())

    handles = [
        layer.register_forward_pre_hook(measure) for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return np.array(found)
