"""From a recipe's `model` section to a timm network whose head fits the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config, resolve_input_data_config
from timm.models import get_model_input_config, parse_model_name
from torch import nn

import bnfinetune.demo  # noqa: F401  (registers the embedded backbone with timm)
from bnfinetune.bn.layers import LAST, is_bn_layer, select_layers
from bnfinetune.bn.statistics.precise import evaluation_mode
from bnfinetune.errors import BackboneError, CheckpointError, did_you_mean
from bnfinetune.recipe import Model
from bnfinetune.training.network.head import change_classes, head_parameters, reset_head
from bnfinetune.training.network.weights import load_weights_file

_SETTLED = {  # arguments of timm.create_model that something else decides
    "num_classes": "the classes of the data decide",
    "features_only": "a network without a classifier cannot be trained to classify",
    "pretrained": "model.pretrained decides",
    "checkpoint_path": "model.checkpoint decides",
}


def build_backbone(section: Model, class_names: Sequence[str]) -> nn.Module:
    """Create the network of a recipe, weights loaded, with one output per class.

    Where the pretrained classifier knows every class by name (its `label_names`), its rows are kept, so that the
    network predicts before any training; a checkpoint's classifier is kept if it has as many classes. Otherwise, and
    wherever `model.head` is not `auto`, the head is new (`reset_head`).

    Raises:
        BackboneError: timm does not know the model, its hub cannot be reached, or an argument is refused.
        CheckpointError: `model.checkpoint` is missing, unreadable or does not fit.
    """
    _check_name(section.name)
    _check_kwargs(section)
    try:
        model = _create(section, class_names)
    except (BackboneError, CheckpointError):
        raise
    except (TypeError, ValueError, AssertionError, KeyError, AttributeError) as error:
        raise BackboneError(f"model.name={section.name} with model.kwargs={section.kwargs}: {_line(error)}") from error
    except Exception as error:
        if not _is_hub_failure(error):
            raise
        raise BackboneError(
            f"model.name={section.name}: its pretrained weights could not be fetched ({_line(error)}); set "
            "model.pretrained=false, or model.checkpoint=FILE, or model.name=local-dir:FOLDER"
        ) from error
    if section.kwargs:
        _check_output(model, section, len(class_names))
    if section.checkpoint is not None:
        load_weights_file(model, Path(section.checkpoint))
        if section.head != "auto":
            reset_head(model)
    if section.grad_checkpointing:
        _checkpoint_gradients(model, section.name)
    return model


def has_bn(section: Model) -> bool:
    """Whether a network has BN layers, told by its architecture alone; False where it cannot be built."""
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(section.name, pretrained=False, **section.kwargs)
    except Exception:  # what is wrong with it is told by whoever builds it in earnest
        return False
    return any(map(is_bn_layer, model.modules()))


def _create(section: Model, class_names: Sequence[str]) -> nn.Module:
    pretrained = section.pretrained and section.checkpoint is None
    if not pretrained:
        plain: nn.Module = timm.create_model(
            section.name, pretrained=False, num_classes=len(class_names), **section.kwargs
        )
        return reset_head(plain)
    model: Any = timm.create_model(section.name, pretrained=True, **section.kwargs)
    labels = model.pretrained_cfg.get("label_names")
    known = isinstance(labels, list | tuple) and set(class_names) <= set(labels)
    rows = [list(labels).index(name) for name in class_names] if known and section.head == "auto" else None
    return change_classes(model, len(class_names), rows)


def _check_name(name: str) -> None:
    try:
        source, model_id = parse_model_name(name)
    except ValueError as error:
        raise BackboneError(f"model.name={name}: {_line(error)}") from error
    if source == "local-dir" and not (Path(model_id) / "config.json").is_file():
        raise BackboneError(f"model.name={name}: no config.json in {model_id}; it must be a folder that timm saved")
    architecture = model_id.partition(".")[0]
    if source is None and not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise BackboneError(f"model.name: timm knows no model {name!r}{hint} (timm.list_models() names all)")


def _is_hub_failure(error: Exception) -> bool:
    """Whether fetching failed: network libraries raise OSError children, the hub its own, timm RuntimeError."""
    return isinstance(error, OSError | RuntimeError) or type(error).__module__.partition(".")[0] in (
        "huggingface_hub",
        "httpx",
        "requests",
        "urllib3",
    )


def _check_kwargs(section: Model) -> None:
    for name, reason in _SETTLED.items():
        if name in section.kwargs:
            raise BackboneError(f"model.kwargs.{name}: {reason}; leave it out")


def _check_output(model: nn.Module, section: Model, classes: int) -> None:
    """Make sure that what `model.kwargs` changed still gives one score per class."""
    found: object
    try:
        with evaluation_mode(model), torch.no_grad():
            scores = model(torch.zeros(1, *input_config(model, None)["input_size"]))
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else f"a {type(scores).__name__}"
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        found = _line(error)
    if found != (1, classes):
        raise BackboneError(
            f"model.kwargs={section.kwargs}: with them {section.name} gives no score per class for an image ({found}): "
            "leave out what changes its output"
        )


def _checkpoint_gradients(model: Any, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise BackboneError(f"model.grad_checkpointing: {name} does not support it; set it to false") from error


def input_config(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """timm's resolved preprocessing of `model`: input_size, mean, std, interpolation, crop_pct, crop_mode.

    The channels are those that the network has; where the known mean and std are of other channels, their averages.
    """
    channels = get_model_input_config(model)["input_size"][0]
    stated = resolve_data_config({}, model=model)
    spread = {
        key: stated[key] if len(stated[key]) == channels else (sum(stated[key]) / len(stated[key]),) * channels
        for key in ("mean", "std")
    }
    config: dict[str, Any] = resolve_input_data_config(model, args=spread)
    if image_size is not None:
        config["input_size"] = (config["input_size"][0], image_size, image_size)
    return config


def restrict_training(model: nn.Module, trainable: str) -> None:
    """Freeze what `model.trainable` leaves out, before any policy."""
    if trainable == "all":
        return
    keep = head_parameters(model)
    if trainable != "head":
        layers = select_layers(model, LAST if trainable == "last_bn_and_head" else "*")
        keep |= {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in keep)


def _line(error: Exception) -> str:
    """The first line of an exception's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__
