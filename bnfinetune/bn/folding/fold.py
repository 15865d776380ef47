"""Folding: BN layers with frozen statistics computed by the convs before them, while training.

`fold_bn` takes nothing away: Parameters, `state_dict`, gradients of the conv's weight and of the BN layer's weight and
bias stay what they were, as does what the model computes. What it saves is BN's pass over the activations, and the
copy of them that BN keeps for backward, in exchange for a copy of the conv's weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from bnfinetune.bn.folding.layers import FoldedBN, fold_pair, is_foldable, unfold_layer
from bnfinetune.bn.folding.pairs import Example, find_pairs
from bnfinetune.bn.layers import bn_class, find_bn_layers, native_class, unwrap, walk_modules
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.errors import PolicyError

_log = logging.getLogger(__name__)


class FoldRow(NamedTuple):
    """One BN layer in the table of `fold_report`.

    Attributes:
        layer: its name.
        conv: the convs that it is folded into, joined by commas; empty if it is not.
        remark: why it is not folded, and what it costs instead.
    """

    layer: str
    conv: str
    remark: str

    @property
    def folded(self) -> bool:
        return bool(self.conv)


class FoldReport(tuple[FoldRow, ...]):
    """The rows of `fold_report`, in the model's order; prints as an aligned table."""

    @property
    def folded(self) -> list[str]:
        """Names of the folded layers."""
        return [row.layer for row in self if row.folded]

    def __str__(self) -> str:
        cells = [("layer", "folded into", "remark"), *((row.layer, row.conv or "-", row.remark) for row in self)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def fold_bn(model: nn.Module, example_input: Example | None = None) -> nn.Module:
    """Folds BN layers with frozen statistics into the convs before them, in place, exactly undone by `unfold_bn`.

    `y = conv(x, W s) + (b + (c - m) s)` with `s = g / sqrt(v + e)`, computed from W, c, g, b in each forward (once,
    where none of them trains). Where the conv has fewer outputs than weights, as with small batches, BN's own pass over
    these outputs is the cheaper way to the same, and is taken. A BN layer is folded if it normalises with running
    statistics in training and in evaluation without updating them, and every input of it is the output of a conv that
    goes nowhere else; `fold_report` says which were, and why others were not.

    Pairs are found by one observed forward: evaluation mode, no gradient, the model's device and dtype; modes and
    random state are put back. Folding again starts afresh.

    Args:
        model: any module with BN layers, wrapped (DDP, `torch.compile`) or not.
        example_input: what the observed forward gets: a tensor, a sequence of positional or a mapping of named
            arguments; by default zeros of timm's `pretrained_cfg["input_size"]`.

    Returns:
        The same model: same Parameters, same `state_dict`. While it is folded, calling one of its convs alone gives
        the normalised output. A change of a folded layer's policy unfolds it first.

    Example:
        >>> fold_bn(freeze_bn(model, affine=False))

    Raises:
        SelectionError: the model has no BN layer.
        PolicyError: no BN layer has frozen statistics, or there is no input that the model takes.
    """
    layers = find_bn_layers(model)
    foldable = {name: layer for name, layer in layers.items() if bn_class(layer) is not None and is_foldable(layer)}
    if not foldable:
        name, layer = next(iter(layers.items()))
        shown = "?" if bn_class(layer) is None else "({}, {}, {}, {})".format(*switches_of(layer))
        raise PolicyError(
            f"no BN layer of {type(unwrap(model)).__name__} has frozen statistics ({name!r} has switches {shown}); "
            f"call freeze_bn(model) first"
        )
    with unfolded(model):
        pairs = find_pairs(model, foldable, example_input)
    unfold_bn(model)
    for name, layer in foldable.items():
        if name in pairs.convs:
            fold_pair(layer, tuple(pairs.convs[name].values()))
        else:
            layer._fold_obstacle = pairs.obstacles[name]  # type: ignore[assignment]
    _log.info("folded %d of %d BN layers of %s", len(pairs.convs), len(layers), type(unwrap(model)).__name__)
    return model


def unfold_bn(model: nn.Module) -> nn.Module:
    """Undoes `fold_bn`: classes and attributes of before, values that training changed stay.

    Args:
        model: any module with BN layers, folded or not.

    Returns:
        The same model.

    Raises:
        SelectionError: the model has no BN layer.
    """
    for layer in find_bn_layers(model).values():
        unfold_layer(layer)
    return model


@contextmanager
def unfolded(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context no BN layer is folded; afterwards those that were are again, without another forward.

    A layer that has left the model meanwhile, or whose statistics are no longer frozen, stays unfolded.

    Args:
        model: any module with BN layers, folded or not.

    Raises:
        SelectionError: the model has no BN layer.
    """
    folded: list[nn.Module] = [layer for layer in find_bn_layers(model).values() if isinstance(layer, FoldedBN)]
    pairs = [(layer, unfold_layer(layer)) for layer in folded]
    try:
        yield model
    finally:
        present = set(model.modules())
        for layer, convs in pairs:
            if layer in present and not isinstance(layer, FoldedBN) and is_foldable(layer):
                fold_pair(layer, convs)


def fold_report(model: nn.Module) -> FoldReport:
    """Which BN layers are folded into which convs, and why others are not.

    Args:
        model: any module with BN layers.

    Raises:
        SelectionError: the model has no BN layer.
    """
    names = {module: name for name, module in walk_modules(model)}
    return FoldReport(_row(name, layer, names) for name, layer in find_bn_layers(model).items())


def _row(name: str, layer: nn.Module, names: dict[nn.Module, str]) -> FoldRow:
    if isinstance(layer, FoldedBN):
        return FoldRow(name, ", ".join(names.get(conv, "outside of this module") for conv in layer._fold_convs), "")
    if bn_class(layer) is None:
        return FoldRow(name, "", f"the forward of {native_class(layer).__name__} is unknown; use register_bn_class")
    switches = switches_of(layer)
    if not is_foldable(layer):
        return FoldRow(name, "", "its statistics are not frozen: ({}, {}, {}, {})".format(*switches))
    cost = "one pass, keeps nothing" if switches.affine == "frozen" else "keeps its input, since its affine trains"
    obstacle = getattr(layer, "_fold_obstacle", "not asked for")
    return FoldRow(name, "", f"{obstacle}; {cost}")
