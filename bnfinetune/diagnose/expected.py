"""BN layers that break a rule of the doctor on purpose: the mark that says so."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bnfinetune.bn.layers import Selection, select_layers
from bnfinetune.diagnose.case import EXPECTED, expected_of
from bnfinetune.diagnose.registry import known_codes


def expect(model: nn.Module, codes: str | Sequence[str], layers: Selection = "*", exclude: Selection = ()) -> nn.Module:
    """Says that BN layers do on purpose what a rule of the doctor reports.

    A key encoder of MoCo or BYOL, or a mean teacher, runs in training mode without gradients and moves its statistics,
    as its method wants; BN102 and BN303 would otherwise advise to freeze it. From here on `check_bn` and `watch_bn`
    judge the model by these rules as if it did not have these layers, and no fix reaches them. Nothing else changes.
    The mark belongs to the layers: it goes along with copies and pickles, is in no `state_dict`, and does not outlive a
    conversion that makes new layers.

    Args:
        model: any module with BN layers, wrapped or not.
        codes: code of a rule, such as `"BN102"`, or several.
        layers: BN layers that are meant; selectors as of `apply_policy`.
        exclude: selectors of layers that are not.

    Returns:
        The model.

    Examples:
        >>> bnf.expect(moco, ["BN102", "BN303"], layers="encoder_k.*")
        >>> print(bnf.check_bn(moco, optimizer))

    Raises:
        SelectionError: there is no such rule, or a selector fits no BN layer.
        LayerError: a selected layer is scripted.
    """
    known = frozenset(known_codes(codes, argument="codes"))
    for layer in select_layers(model, layers, exclude).values():
        setattr(layer, EXPECTED, expected_of(layer) | known)
    return model
