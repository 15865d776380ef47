"""The table of every BN layer of a model."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from bnfinetune.bn.layers import eps_of, find_bn_layers, native_class
from bnfinetune.bn.policy.state import Switches
from bnfinetune.bn.policy.switched_layer import switches_of, trainable
from bnfinetune.bn.saved_report import SavedReport, aligned
from bnfinetune.errors import LayerError


class BNRow(NamedTuple):
    """One BN layer in the table of `describe_bn`."""

    name: str
    type: str
    train_stats: str
    update_stats: str
    affine: str
    eval_stats: str
    affine_grad: str
    momentum: float | None
    eps: float | None
    mode: str


class BNTable(SavedReport, tuple[BNRow, ...]):
    """The rows of `describe_bn`, in the model's order; prints as an aligned table, saves as JSON."""

    def __str__(self) -> str:
        head = [field.replace("_", " ") for field in BNRow._fields]
        return aligned([head, *([_shown(value) for value in row] for row in self)])

    def to_dict(self) -> dict[str, Any]:
        """The rows as dicts, under `layers`."""
        return {"layers": [row._asdict() for row in self]}


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value in (None, "") else str(value)


def describe_bn(model: nn.Module) -> BNTable:
    """Tabulates every BN layer: type, switches, gradients of weight and bias, momentum, eps and mode.

    Args:
        model: any module with BN layers, under a policy or not.

    Returns:
        One row per layer. A layer whose class has an unregistered `forward` shows "?" for its switches.

    Raises:
        SelectionError: the model has no BN layer.
    """
    return BNTable(_row(name, layer) for name, layer in find_bn_layers(model).items())


def _row(name: str, layer: Any) -> BNRow:
    eps: float | None
    try:
        switches, eps = switches_of(layer), eps_of(layer)
    except LayerError:
        switches, eps = Switches("?", "?", "?", "?"), getattr(layer, "eps", None)
    grads = [{None: "none", True: "yes", False: "no"}[flag] for flag in trainable(layer)]
    return BNRow(
        name or "<root>",
        native_class(layer).__name__,
        *switches,
        affine_grad=grads[0] if grads[0] == grads[1] else "/".join(grads),
        momentum=getattr(layer, "momentum", None),
        eps=eps,
        mode="train" if layer.training else "eval",
    )
