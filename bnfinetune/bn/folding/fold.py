"""Folding: BN layers with frozen statistics computed by the convs before them, while training.

`fold_bn` takes nothing away: Parameters, `state_dict`, gradients of the conv's weight and of the BN layer's weight and
bias stay what they were, as does what the model computes. What it saves is BN's pass over the activations, and the
copy of them that BN keeps for backward, in exchange for a copy of the conv's weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import nn

from bnfinetune.bn.folding.keeper import Keeper
from bnfinetune.bn.folding.layers import (
    FoldedBN,
    FoldedConv,
    fold_pair,
    is_foldable,
    keep_folded,
    unfold_conv,
    unfold_layer,
)
from bnfinetune.bn.folding.observed import Example
from bnfinetune.bn.folding.pairs import find_pairs
from bnfinetune.bn.layers import bn_class, find_bn_layers, native_class, unwrap, walk_modules
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.bn.saved_report import SavedReport, aligned
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


class FoldReport(SavedReport, tuple[FoldRow, ...]):
    """The rows of `fold_report`, in the model's order; prints as an aligned table and saves as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """The rows as dicts, under `layers`."""
        return {"layers": [row._asdict() for row in self]}

    @property
    def folded(self) -> list[str]:
        """Names of the folded layers."""
        return [row.layer for row in self if row.folded]

    def __str__(self) -> str:
        return aligned(
            [("layer", "folded into", "remark"), *((row.layer, row.conv or "-", row.remark) for row in self)]
        )


def fold_bn(model: nn.Module, example_input: Example | None = None) -> nn.Module:
    """Folds BN layers with frozen statistics into the convs before them, in place, exactly undone by `unfold_bn`.

    `y = conv(x, W s) + (b + (c - m) s)` with `s = g / sqrt(v + e)`, computed from W, c, g, b in each forward, whatever
    has changed them (`folded(keep=True)` spares that where nothing does). Where the conv has fewer outputs than
    weights, as with small batches, BN's own pass over these outputs is the cheaper way to the same, and is taken. A BN
    layer is folded if it normalises with running statistics in training and in evaluation without updating them, and
    every input of it is the output of a conv that goes nowhere else; `fold_report` says which were, and why others
    were not.

    Pairs are found by observed forwards in evaluation and in training, without gradient, on the model's device and
    dtype; modes, buffers and random state are put back. Folding again starts afresh. In each forward the conv hands
    itself to the BN layer behind it; whatever else comes between, or reads the conv's output, gets what the conv alone
    computes, and the BN layer then normalises as it would unfolded. That is also what happens where a forward is
    traced or compiled, under functional transforms, in inference mode, and without gradient in training mode.

    Args:
        model: any module with BN layers, wrapped (DDP, `torch.compile`) or not.
        example_input: what the observed forward gets: a tensor, a sequence of positional or a mapping of named
            arguments; by default zeros of timm's `pretrained_cfg["input_size"]`.

    Returns:
        The same model: same Parameters, same `state_dict`. A change of a folded layer's policy unfolds it first.

    Examples:
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

    Convs compute their own output again even where their BN layers have been replaced meanwhile.

    Args:
        model: any module with BN layers, folded or not.

    Returns:
        The same model.

    Raises:
        SelectionError: the model has no BN layer.
    """
    if not any(isinstance(module, FoldedConv) for module in model.modules()):
        find_bn_layers(model)
    for module in model.modules():
        unfold_conv(module)
        unfold_layer(module)
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
    folded: list[Any] = [layer for layer in find_bn_layers(model).values() if isinstance(layer, FoldedBN)]
    pairs = [(layer, layer._fold_keeper, unfold_layer(layer)) for layer in folded]
    try:
        yield model
    finally:
        present = set(model.modules())
        for layer, keeper, convs in pairs:
            if layer in present and not isinstance(layer, FoldedBN) and is_foldable(layer):
                fold_pair(layer, convs, keeper)


@contextmanager
def folded(model: nn.Module, example_input: Example | None = None, *, keep: bool = False) -> Iterator[nn.Module]:
    """Within this context BN layers with frozen statistics are folded as by `fold_bn`; afterwards none is.

    Args:
        model: any module with BN layers.
        example_input: as in `fold_bn`.
        keep: keep folded parameters over forwards for as long as nothing that they come from is seen to change. That
            saves 2 to 15 % of a forward without gradient (the more, the smaller the network and the batch) and 1 % of
            a training step; but changes through `.data`, or of a vector that the parameters are views of, go unseen,
            so the caller must own all updates within the context.

    Raises:
        SelectionError: the model has no BN layer.
        PolicyError: no BN layer has frozen statistics, or there is no input that the model takes.
    """
    fold_bn(model, example_input)
    try:
        with folds_kept(model) if keep else nullcontext():
            yield model
    finally:
        unfold_bn(model)


def keep_folds(model: nn.Module) -> None:
    """Lets a folded model keep folded parameters over forwards until it is unfolded, as within `folds_kept`."""
    for layer in model.modules():
        keep_folded(layer, Keeper())


@contextmanager
def folds_kept(model: nn.Module) -> Iterator[None]:
    """Within this context folded parameters are kept over forwards, as by `folded(keep=True)`.

    Args:
        model: a folded model; layers that are folded later keep nothing.
    """
    keep_folds(model)
    try:
        yield
    finally:
        for layer in model.modules():
            keep_folded(layer, None)


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
