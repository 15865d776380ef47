"""The BatchNorm core: one layer with independent switches, usable alone in anybody's training loop."""

from bnfinetune.bn.layers import find_bn_layers, register_bn_class
from bnfinetune.bn.policy import BNPolicy, apply_policy, describe_bn, freeze_bn, restore_bn, unfreeze_bn

__all__ = [
    "BNPolicy",
    "apply_policy",
    "describe_bn",
    "find_bn_layers",
    "freeze_bn",
    "register_bn_class",
    "restore_bn",
    "unfreeze_bn",
]
