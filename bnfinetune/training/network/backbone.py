"""From a recipe's `model` section to a timm network whose head fits the classes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import load_state_dict, parse_model_name
from torch import nn

import bnfinetune.demo  # noqa: F401  (registers the embedded backbone with timm)
from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.errors import BackboneError, CheckpointError
from bnfinetune.recipe import Model
from bnfinetune.training.network.optim import head_parameters


def build_backbone(section: Model, class_names: Sequence[str]) -> nn.Module:
    """Create the network of a recipe, weights loaded, with one output per class.

    Where the pretrained classifier knows every class by name (its `label_names`), its rows are kept, so that the
    network predicts before any training; otherwise the head is new.

    Raises:
        BackboneError: timm does not know the model, its hub cannot be reached, or an argument is refused.
        CheckpointError: `model.checkpoint` is missing, unreadable or does not fit.
    """
    _check_name(section.name)
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
    if section.checkpoint is not None:
        _load_weights(model, Path(section.checkpoint))
    if section.grad_checkpointing:
        _checkpoint_gradients(model, section.name)
    if section.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def _create(section: Model, class_names: Sequence[str]) -> nn.Module:
    pretrained = section.pretrained and section.checkpoint is None
    if not pretrained:
        plain: nn.Module = timm.create_model(
            section.name, pretrained=False, num_classes=len(class_names), **section.kwargs
        )
        return plain
    model: Any = timm.create_model(section.name, pretrained=True, **section.kwargs)
    labels = model.pretrained_cfg.get("label_names")
    known = isinstance(labels, list | tuple) and set(class_names) <= set(labels)
    rows = [list(labels).index(name) for name in class_names] if known and section.head == "auto" else None
    return _fit_head(model, len(class_names), rows)


def _fit_head(model: Any, num_classes: int, rows: list[int] | None) -> nn.Module:
    """Give the model a new classifier; a linear one starts from `rows` of the old one where these are given."""
    old = model.get_classifier()
    model.reset_classifier(num_classes)
    new = model.get_classifier()
    if rows is not None and isinstance(old, nn.Linear) and isinstance(new, nn.Linear):
        with torch.no_grad():
            new.weight.copy_(old.weight[rows])
            new.bias.copy_(old.bias[rows])
    fitted: nn.Module = model
    return fitted


def _check_name(name: str) -> None:
    try:
        source, model_id = parse_model_name(name)
    except ValueError as error:
        raise BackboneError(f"model.name={name}: {_line(error)}") from error
    if source == "local-dir" and not (Path(model_id) / "config.json").is_file():
        raise BackboneError(f"model.name={name}: no config.json in {model_id}; it must be a folder that timm saved")
    architecture = model_id.partition(".")[0]
    if source is None and not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise BackboneError(f"model.name: timm knows no model {name!r}{hint} (timm.list_models() names all)")


def _is_hub_failure(error: Exception) -> bool:
    """Whether fetching failed: network libraries raise OSError children, the hub its own, timm RuntimeError."""
    return isinstance(error, OSError | RuntimeError) or type(error).__module__.partition(".")[0] in (
        "huggingface_hub",
        "httpx",
        "requests",
        "urllib3",
    )


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load a weights file into `model`; a head of another size stays new, anything else missing is an error."""
    if not path.is_file():
        raise CheckpointError(f"model.checkpoint: no file {path}")
    try:
        if _is_safetensors(path):  # timm goes by the name
            weights = load_file(str(path))
        else:
            weights = load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip each raise their own; all mean an unusable file
        raise CheckpointError(
            f"model.checkpoint: {path} is neither safetensors nor a tensors-only pickle ({_line(error)})"
        ) from error
    own = model.state_dict()
    head = head_parameters(model)
    head_names = {name for name, parameter in model.named_parameters() if id(parameter) in head}
    for name in head_names & weights.keys():
        if weights[name].shape != own[name].shape:
            del weights[name]
    missing = own.keys() - weights.keys() - head_names
    wrong = [name for name, value in weights.items() if name in own and value.shape != own[name].shape]
    for problem, names in (
        ("lacks", sorted(missing)),
        ("has another shape of", wrong),
        ("has unknown", sorted(weights.keys() - own.keys())),
    ):
        if names:
            raise CheckpointError(
                f"model.checkpoint: {path} {problem} {names[0]} ({len(names)} such): is model.name right?"
            )
    model.load_state_dict(weights, strict=False)


def _is_safetensors(path: Path) -> bool:
    """Whether a file is one by its name, or begins as one does: with the length of its header and a JSON mapping."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _checkpoint_gradients(model: Any, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise BackboneError(f"model.grad_checkpointing: {name} does not support it; set it to false") from error


def input_config(model: nn.Module, image_size: int | None) -> dict[str, Any]:
    """timm's resolved preprocessing of `model`: input_size, mean, std, interpolation, crop_pct, crop_mode."""
    config: dict[str, Any] = resolve_data_config({}, model=model)
    if image_size is not None:
        config["input_size"] = (config["input_size"][0], image_size, image_size)
    return config


def restrict_training(model: nn.Module, trainable: str) -> None:
    """Freeze what `model.trainable` leaves out, before any policy: `bn_and_head` or `head`."""
    if trainable == "all":
        return
    keep = head_parameters(model)
    if trainable == "bn_and_head":
        keep |= {id(p) for layer in find_bn_layers(model).values() for p in layer.parameters(recurse=False)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in keep)


def _line(error: Exception) -> str:
    """The first line of an exception's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__
