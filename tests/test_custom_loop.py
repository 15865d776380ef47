"""The README's custom loop runs as it stands there, and does what it says."""

import re
from pathlib import Path

import timm
import torch

README = Path(__file__).parents[1] / "README.md"


def custom_loop() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(block for block in blocks if "Accelerator" in block)


def test_the_readmes_loop_trains_with_bn_frozen(monkeypatch):
    code = custom_loop()
    assert len(code.strip().splitlines()) <= 24
    torch.manual_seed(0)
    start = {}
    create = timm.create_model

    def create_offline(name, pretrained, **kwargs):
        model = create("resnet18", pretrained=False, **kwargs)
        start.update({key: value.clone() for key, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(timm, "create_model", create_offline)
    images, labels = torch.randn(12, 3, 64, 64), torch.arange(12) % 3
    space = {"dataset": torch.utils.data.TensorDataset(images, labels), "num_classes": 3, "epochs": 2}
    exec(code, space)
    end = space["accelerator"].unwrap_model(space["model"]).state_dict()
    norms = [key for key in start if "bn" in key or "downsample.1" in key]
    assert norms
    assert all(torch.equal(start[key], end[key]) for key in norms)
    assert not torch.equal(start["conv1.weight"], end["conv1.weight"])
