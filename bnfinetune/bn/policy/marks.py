"""Which layers a model has had under a policy, remembered by the modules that hold them.

A layer that others put in its place knows nothing of the policy; its parent does. The mark is a plain attribute: deep
copies, pickles and wrappers keep it, `state_dict` does not show it, and `restore_bn` takes it away.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from bnfinetune.bn.layers import is_bn_layer, walk_modules
from bnfinetune.bn.policy.state import Switches
from bnfinetune.bn.policy.switched_layer import SwitchedBN

_MARK = "_bn_children"


def mark(model: nn.Module, switches: Mapping[nn.Module, Switches]) -> None:
    """Lets the parents of layers remember that these are under a policy, and under which switches."""
    for parent in model.modules():
        found = {name: switches[child] for name, child in parent.named_children() if child in switches}
        if found:
            vars(parent)[_MARK] = vars(parent).get(_MARK, {}) | found


def unmark(model: nn.Module, layers: Collection[nn.Module]) -> None:
    """Lets the parents of layers forget them."""
    for parent in model.modules():
        marked: dict[str, Switches] = vars(parent).pop(_MARK, {})
        kept = {name: switches for name, switches in marked.items() if parent._modules.get(name) not in layers}
        if kept:
            vars(parent)[_MARK] = kept


def replaced_layers(model: nn.Module) -> dict[str, Switches]:
    """BN layers that stand where others were under a policy, by name, with the switches of that policy."""
    found: dict[str, Switches] = {}
    for prefix, parent in walk_modules(model):
        for name, switches in vars(parent).get(_MARK, {}).items():
            for inner, module in walk_modules(parent._modules.get(name) or nn.Identity()):
                if is_bn_layer(module) and not isinstance(module, SwitchedBN):
                    found[".".join(part for part in (prefix, name, inner) if part)] = switches
    return found
