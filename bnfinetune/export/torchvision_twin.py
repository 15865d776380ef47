"""Which torchvision network has the same tensors under the same names as a timm one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final

import torch
import torchvision  # type: ignore[import-untyped]

from bnfinetune.errors import ExportError

_TRIED: Final = 3  # networks of the nearest names
Shapes = Mapping[str, tuple[int, ...]]


def torchvision_twin(model: Any) -> str:
    """The name of the torchvision network that takes the `state_dict` of a timm network as it is.

    Raises:
        ExportError: There is none; the message says what the nearest has otherwise.
    """
    architecture = str(model.pretrained_cfg["architecture"])
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    candidates: dict[str, str] = {
        _plain(name): name for name in torchvision.models.list_models(module=torchvision.models)
    }
    near = get_close_matches(_plain(architecture), candidates, n=_TRIED, cutoff=0.5)
    differences = {}
    for name in (candidates[each] for each in near):
        theirs = _shapes(name, model.num_classes)
        if own == theirs:
            return name
        differences[name] = _differing(own, theirs)
    if not differences:
        raise ExportError(f"format=torchvision: torchvision has no network like {architecture}; export it as onnx")
    name = min(differences, key=lambda each: len(differences[each]))
    raise ExportError(
        f"format=torchvision: {architecture} is no network of torchvision: {len(differences[name])} tensors do not "
        f"match those of the nearest, {name}, such as {differences[name][0]}; format=onnx takes any network"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _shapes(name: str, classes: int) -> Shapes:
    """Names and shapes of a torchvision network's tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some networks announce that their weights will be drawn otherwise
        try:
            with torch.device("meta"):
                model = torchvision.models.get_model(name, weights=None, num_classes=classes)
        except NotImplementedError:  # the widths of RegNet are computed by tensors
            model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _differing(own: Shapes, theirs: Shapes) -> list[str]:
    """In words, every tensor that one of two networks has otherwise or not at all."""
    return [
        *(f"{key} ({_size(own[key])} here, {_size(theirs[key])} there)" for key in own
          if key in theirs and own[key] != theirs[key]),
        *(f"{key} (here alone)" for key in own if key not in theirs),
        *(f"{key} (there alone)" for key in theirs if key not in own),
    ]  # fmt: skip


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
