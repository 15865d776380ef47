"""The BatchNorm core: one layer with independent switches, usable alone in anybody's training loop."""

from bnfinetune.bn.convert import convert_sync_bn, revert_sync_bn
from bnfinetune.bn.domains import domain, export_domain
from bnfinetune.bn.group_norm import GroupNormReport, convert_group_norm
from bnfinetune.bn.layers import find_bn_layers, register_bn_class
from bnfinetune.bn.policy import BNPolicy, apply_policy, auto_momentum, freeze_bn, restore_bn, unfreeze_bn
from bnfinetune.bn.saving import load_policy_state, policy_state
from bnfinetune.bn.table import describe_bn
from bnfinetune.bn.updates import StatSnapshot, no_stat_updates

__all__ = [
    "BNPolicy",
    "GroupNormReport",
    "StatSnapshot",
    "apply_policy",
    "auto_momentum",
    "convert_group_norm",
    "convert_sync_bn",
    "describe_bn",
    "domain",
    "export_domain",
    "find_bn_layers",
    "freeze_bn",
    "load_policy_state",
    "no_stat_updates",
    "policy_state",
    "register_bn_class",
    "restore_bn",
    "revert_sync_bn",
    "unfreeze_bn",
]
