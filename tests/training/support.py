"""Small image folders and networks with known, random statistics."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.training import run
from bnfinetune.training.ending import Best
from bnfinetune.training.loop.trainer import Trainer

CLASSES = ("blue", "green", "red")


def write_images(folder: Path, *, train: int = 6, val: int = 3, size: int = 40) -> Path:
    """A folder of three classes that colour tells apart, with noise; `train` and `val` images of each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for channel, name in ((2, "blue"), (1, "green"), (0, "red")):
            target = folder / split / name
            target.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(target / f"{number}.png")
    return folder


def random_network(name: str, num_classes: int = 3, seed: int = 0, **kwargs) -> nn.Module:
    """A timm network whose every BN layer does something."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes, **kwargs)
    for layer in find_bn_layers(model).values():
        layer.running_mean.normal_(std=0.1)
        layer.running_var.uniform_(0.5, 1.5)
        layer.weight.data.uniform_(0.5, 1.5)
        layer.bias.data.normal_(std=0.1)
    return model


def write_weights(path: Path, name: str, num_classes: int = 3, **kwargs) -> dict[str, torch.Tensor]:
    """Random weights with random statistics and affine parameters, as a file; what is in it."""
    model = random_network(name, num_classes, seed=1, **kwargs)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(weights, str(path))
    return weights


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an exported folder."""
    return load_file(str(folder / "model.safetensors"))


def bn_keys(name: str) -> dict[str, set[str]]:
    """Names of `statistics` and `affine` tensors of BN layers, and of `other` floating-point tensors."""
    model = timm.create_model(name, num_classes=3)
    layers = [n for n, m in model.named_modules() if hasattr(m, "running_mean")]
    statistics = {f"{layer}.{tensor}" for layer in layers for tensor in ("running_mean", "running_var")}
    affine = {f"{layer}.{tensor}" for layer in layers for tensor in ("weight", "bias")}
    floating = {key for key, value in model.state_dict().items() if value.is_floating_point()}
    head = {key for key in floating if key.startswith(model.pretrained_cfg["classifier"])}
    return {"statistics": statistics, "affine": affine, "head": head, "other": floating - statistics - affine - head}


@contextmanager
def broken_off(monkeypatch, update: int):
    """A run within this context is interrupted when it begins the update after so many, without warning."""
    original = Trainer._update

    def interrupted(self, group):
        if self.progress.update == update:
            raise KeyboardInterrupt
        original(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def before_ending(action):
    """From now on in this process, `action` gets the trainer of a run before its best network is read from disk."""
    measure_best = run.measure_best

    def ending(setup, *others):
        action(setup.trainer)
        return measure_best(setup, *others)

    run.measure_best = ending


def leave_out_ending(patch=setattr):
    """Runs end without measuring their best network and without a report."""
    patch(run, "measure_best", lambda *_: Best(None, {}, None, None, {}, {}))
    patch(run, "write_report", lambda *_: None)
