"""Where the statistics of an exported network come from, and whether they still belong to its weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.tensor_hash import sha256_of
from bnfinetune.errors import SelectionError
from bnfinetune.training.saving.atomic import write_json

PROVENANCE = "statistics.json"


def write_provenance(folder: Path, model: nn.Module, source: dict[str, Any]) -> None:
    """Write what the running statistics of `model` were computed from, with the hash of the weights they belong to.

    Args:
        folder: Where the network is exported.
        model: The network.
        source: What is known, such as the data, its fingerprint, preprocessing and number of images.
    """
    write_json(folder / PROVENANCE, {**source, "weights_sha256": weights_hash(model)})


def stated_levels(folder: Path) -> dict[str, tuple[float, float]]:
    """Which values of 16-bit and float images were 0 and 255 to the network in `folder`; empty where none were met."""
    try:
        stated = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["levels"]
        return {str(kind): (float(black), float(white)) for kind, (black, white) in stated.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def check_provenance(folder: Path, model: nn.Module) -> None:
    """Warn if the statistics in `folder` were computed for other weights than those that lie there now."""
    try:
        stated = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if stated != weights_hash(model):
        warnings.warn(
            f"{folder}: the BatchNorm statistics were computed for other weights than these; "
            f"run `bnfinetune recalibrate checkpoint={folder}`",
            stacklevel=2,
        )


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over all that BN statistics depend on: names and values of every tensor but the statistics."""
    try:
        layers = find_bn_layers(model)
    except SelectionError:
        layers = {}
    statistics = {
        f"{name}.{kind}" for name in layers for kind in ("running_mean", "running_var", "num_batches_tracked")
    }
    return sha256_of({name: tensor for name, tensor in model.state_dict().items() if name not in statistics})
