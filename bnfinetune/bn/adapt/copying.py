"""The copies that adapt: bare, in evaluation mode, under switches of their own."""

from __future__ import annotations

import copy
import glob
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bnfinetune.bn.folding.fold import unfold_bn
from bnfinetune.bn.layers import find_bn_layers, unwrap
from bnfinetune.bn.policy.apply import apply_policy
from bnfinetune.bn.policy.spec import BNPolicy


def bare_copy(model: nn.Module) -> nn.Module:
    """A bare copy in evaluation mode, without folding."""
    with torch.inference_mode(False):
        net = unfold_bn(copy.deepcopy(unwrap(model)))
    return net.eval()


def switch_where(net: nn.Module, applies: Callable[[nn.Module], object], **switches: Any) -> None:
    """Applies switches to those BN layers that have what it takes."""
    names = [glob.escape(name) for name, layer in find_bn_layers(net).items() if applies(layer)]
    if names:
        apply_policy(net, BNPolicy(layers=names, **switches))
