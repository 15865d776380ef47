"""Every example of docs/integrations.md runs as it stands, each section with the trainer that it is about."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bnfinetune as bnf
from tests.bn.models import differing, randomise, tensors_of

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 3


def examples(section: str) -> list[str]:
    [text] = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model("test_resnet", num_classes=3))


def loader() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, LABELS), 8)


def statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors_of(model).items() if "running" in key}


def run(section: str, names: dict[str, Any], after_first: Callable[[dict[str, Any]], None] | None = None) -> None:
    for number, example in enumerate(examples(section)):
        exec(compile(example, f"{PAGE.name}: {section}, {number + 1}", "exec"), names)
        if not number and after_first is not None:
            after_first(names)


@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bnfinetune.integrations.hf")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=3, num_classes=3)
    torch.manual_seed(0)
    model = transformers.TimmWrapperForImageClassification(config)
    items = [{"pixel_values": image, "labels": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]
    silent = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(str(tmp_path), num_train_epochs=1, eval_strategy="epoch", **silent)
    before = statistics(model)

    def thaw(names: dict[str, Any]) -> None:
        assert not differing(before, statistics(model))
        bnf.restore_bn(model)

    names = {"model": model, "arguments": arguments, "train_set": items, "test_set": items}
    run("transformers' Trainer", names, thaw)
    assert names["callback"].report.samples == 16


@pytest.mark.filterwarnings("ignore")
def test_lightning():
    pl = pytest.importorskip("lightning.pytorch")
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("lightning 2.5 has no EMAWeightAveraging")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = network(), torch.nn.Linear(3, 3)

        def forward(self, images):
            return self.head(self.backbone(images))

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), 0.01)

    module = Module()
    before = statistics(module)

    def thaw(names: dict[str, Any]) -> None:
        assert not differing(before, statistics(module))
        bnf.restore_bn(module)

    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    names = {"module": module, "train_loader": loader(), "test_loader": loader()}
    run("Lightning", names | {"quiet": {"accelerator": "cpu", "devices": 1, **silent}}, thaw)
    assert differing(before, statistics(module))


def test_timms_script():
    pytest.importorskip("timm.task")
    model = network()
    before = statistics(model)
    names = {"model": model, "train_loader": loader()}
    run("timm's train.py", names)
    assert not differing(before, statistics(model))
    assert differing(before, statistics(names["task"].get_eval_model(ema=True).module))


def test_torchvisions_scripts(capsys):
    pytest.importorskip("torchvision")
    names: dict[str, Any] = {}
    run("torchvision's reference scripts", names)
    assert {group["weight_decay"] for group in names["optimizer"].param_groups} == {0.0, 1e-4}
    assert "FrozenBatchNorm2d" in capsys.readouterr().out


def test_loops_like_detectron2s():
    model = randomise(timm.create_model("test_efficientnet", num_classes=3)).eval()
    expected = model(IMAGES)
    before = statistics(model)

    def same(names: dict[str, Any]) -> None:
        torch.testing.assert_close(names["model"].eval()(IMAGES), expected)

    run("Loops like detectron2's", {"model": model, "train_loader": loader()}, same)
    assert differing(before, statistics(model))


@pytest.mark.slow
def test_ultralytics(tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    ultralytics = pytest.importorskip("ultralytics")
    draws = np.random.default_rng(0)
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "set" / place).mkdir(parents=True)
        for number in range(4):
            pixels = draws.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / place / f"{number}.png")
    kept: dict[str, Any] = {}
    yolo = ultralytics.YOLO("yolo11n-cls.yaml")
    yolo.add_callback("on_pretrain_routine_end", lambda trainer: kept.update(before=tensors_of(trainer.model)))
    yolo.add_callback("on_train_end", lambda trainer: kept.update(after=tensors_of(trainer.model), trainer=trainer))
    settings = {"data": str(tmp_path / "set"), "epochs": 1, "imgsz": 32, "batch": 4, "workers": 0, "device": "cpu"}
    settings |= {"plots": False, "amp": False, "verbose": False, "project": str(tmp_path / "runs")}
    run("ultralytics", {"yolo": yolo, "settings": settings})
    moved = differing(kept["before"], kept["after"])
    assert any("conv.weight" in key for key in moved)
    assert not [key for key in moved if "running" in key]
    assert b"bnfinetune" not in Path(kept["trainer"].best).read_bytes()


def test_every_section_is_run():
    sections = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    source = Path(__file__).read_text()
    assert all(examples(section) and f'run("{section}"' in source for section in sections)
