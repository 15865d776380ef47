"""The memory format of a network, which changes no value of it."""

import pytest
import timm
import torch

from bnfinetune.training.network.shapes import input_format, set_format

LAST, FIRST = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
@pytest.mark.parametrize(
    ("asked", "side", "device", "expected"),
    [
        ("auto", 128, "cpu", LAST),
        ("auto", 95, "cpu", FIRST),
        ("auto", 128, "cuda", FIRST),
        (True, 64, "cuda", LAST),
        (False, 128, "cpu", FIRST),
    ],
)
def test_activations_are_stored_as_is_faster_there(name, asked, side, device, expected):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(2, 3, side, side)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = model(images)
    set_format(model, asked, (3, side, side), torch.device(device))
    assert input_format(model) == expected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(images.contiguous(memory_format=expected)), scores, rtol=1e-4, atol=1e-5)
