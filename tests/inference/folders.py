"""Folders of small networks as a run writes them, without a run: random weights, statistics and thresholds."""

from pathlib import Path

import torch

from bnfinetune.recipe_files import dump_recipe, load_recipe
from bnfinetune.training.network.backbone import input_config
from bnfinetune.training.saving.timm_folder import save_timm_folder
from tests.training.support import CLASSES, random_network


def network(name: str, classes: int = 3, seed: int = 0, **kwargs) -> torch.nn.Module:
    """A timm network whose every BN layer does something, in evaluation mode."""
    return random_network(name, classes, seed, **kwargs).eval()


def write_network(folder: Path, name: str, source: str = "demo", size: int = 32, thresholds=(), **overrides) -> Path:
    """RUN/best of a network of three classes for images of `size` pixels."""
    model = network(name)
    task = {"data.task": "multilabel"} if thresholds else {}
    recipe = load_recipe({}, {"model.name": name, "data.source": source, "data.image_size": size, **task, **overrides})
    statistics = {"computed": "running averages of training", "source": source}
    config = input_config(model, size)
    save_timm_folder(folder, model, CLASSES, config, dump_recipe(recipe), statistics, {}, thresholds)
    return folder
