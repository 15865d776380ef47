"""What a model predicts, in whatever form it gives it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

_FIELDS = ("logits", "pred_logits", "pred", "preds", "prediction", "predictions", "scores", "probs", "out", "output")
"""What libraries call a prediction: transformers, DETR, torchvision's segmentation, and people's own dicts."""


def prediction_of(output: Any, images: int) -> Tensor | None:
    """The tensor of an output that says something of each image; None where there is none that is surely it.

    Args:
        output: a tensor, or any nest of sequences, mappings, named tuples and dataclasses.
        images: how many images went in.

    Returns:
        A field of a usual name, such as `logits`, else the first tensor: floating-point, of two or more dimensions,
        the first of them the batch. So it is no loss, which is a number. Lists with a dict for each image, as detectors
        give, hold none: their boxes cannot be compared row by row.
    """
    if isinstance(output, Tensor):
        return output if _has_rows(output, images) else None
    parts = _parts(output)
    if not isinstance(parts, Mapping):
        if parts and all(isinstance(part, Mapping) for part in parts):
            return None
        parts = dict(enumerate(parts))
    for part in [parts[name] for name in _FIELDS if name in parts] + list(parts.values()):
        found = prediction_of(part, images)
        if found is not None and found.ndim > 1:
            return found
    return None


def _has_rows(tensor: Tensor, images: int) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 0 and len(tensor) == images


def first_tensor(value: Any, fits: Callable[[Tensor], bool] = Tensor.is_floating_point) -> Tensor | None:
    """The first tensor in nested arguments or outputs that fits, the first of floating-point numbers by default."""
    if isinstance(value, Tensor):
        return value if fits(value) else None
    parts = _parts(value)
    for part in parts.values() if isinstance(parts, Mapping) else parts:
        found = first_tensor(part, fits)
        if found is not None:
            return found
    return None


def _parts(value: Any) -> Mapping[Any, Any] | tuple[Any, ...]:
    """What a nest holds one level down: by name where it has names, else in order; nothing if it is no nest."""
    if isinstance(value, Mapping):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    return tuple(value) if isinstance(value, tuple | list) else ()
