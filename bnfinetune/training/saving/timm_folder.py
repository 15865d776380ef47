"""Networks written for use: folders that timm loads by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf  # the public save_for_hf refuses channels_last weights
from torch import nn

from bnfinetune.errors import CheckpointError
from bnfinetune.training.saving.atomic import in_words, write_folder, write_json, write_text
from bnfinetune.training.saving.provenance import write_provenance

WEIGHTS = "model.safetensors"
RECIPE = "recipe.yaml"
_THRESHOLDS = "label_thresholds"  # beside timm's label_names


def save_timm_folder(
    folder: Path,
    model: nn.Module,
    class_names: Sequence[str],
    data_config: Mapping[str, Any],
    recipe_text: str,
    statistics: dict[str, Any],
    norms: Mapping[str, Any],
    thresholds: Sequence[float] = (),
) -> None:
    """Write what `fill_timm_folder` writes as a folder that is whole or absent.

    Raises:
        CheckpointError: The system refused to write.
    """
    content = (model, class_names, data_config, recipe_text, statistics, norms, thresholds)
    with in_words(f"the best network, {folder},"):
        write_folder(folder, lambda target: fill_timm_folder(target, *content))


def fill_timm_folder(
    target: Path,
    model: nn.Module,
    class_names: Sequence[str],
    data_config: Mapping[str, Any],
    recipe_text: str,
    statistics: dict[str, Any],
    norms: Mapping[str, Any],
    thresholds: Sequence[float] = (),
) -> None:
    """Fill a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads with nothing but timm.

    The exception is a network whose BatchNorm has become GroupNorm, which timm cannot build; `norms` then says how.

    It holds weights, preprocessing, class names, the recipe that made it, and where its statistics come from; of
    several labels per image, also the probability from which on each class is predicted.
    """
    save_tensors(target / WEIGHTS, model.state_dict())
    labels = {"label_names": list(class_names)}
    save_config_for_hf(model, str(target / "config.json"), model_config=labels, data_config=dict(data_config))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    # both stand beside them too; transformers would hand each number of classes to timm
    config.get("model_args", {}).pop("num_classes", None)
    config["pretrained_cfg"].pop("label_names", None)
    cuts = {_THRESHOLDS: list(thresholds)} if thresholds else {}
    write_json(target / "config.json", {**config, **norms, **cuts})
    write_text(target / RECIPE, recipe_text)
    write_provenance(target, model, statistics)


def stated_thresholds(folder: Path) -> tuple[float, ...]:
    """The probabilities from which on the network in `folder` predicts each class; empty where it tells none."""
    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))[_THRESHOLDS]
        return tuple(map(float, stated))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors; tensors that share memory are written once each."""
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, str(path))


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an exported or saved folder, on the CPU."""
    try:
        return load_file(str(folder / WEIGHTS))
    except Exception as error:  # safetensors raises its own error and OSError alike
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error
