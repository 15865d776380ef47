"""The BatchNorm core: one layer with independent switches, usable alone in anybody's training loop."""

from bnfinetune.bn.absorb import absorb_bn
from bnfinetune.bn.adapt import Tent, adapt_model
from bnfinetune.bn.average import average_networks
from bnfinetune.bn.convert.frozen_batch_norm import convert_frozen_bn
from bnfinetune.bn.convert.group_norm import GroupNormReport, convert_group_norm
from bnfinetune.bn.folding.fold import fold_bn, fold_report, folded, unfold_bn
from bnfinetune.bn.folding.fuse import fuse_bn
from bnfinetune.bn.layers import find_bn_layers, register_bn_class
from bnfinetune.bn.patch import BNPatch, load_bn, save_bn
from bnfinetune.bn.policy.apply import apply_policy, freeze_bn, frozen, restore_bn, unfreeze_bn
from bnfinetune.bn.policy.domains import domain, export_domain
from bnfinetune.bn.policy.saving import load_policy_state, policy_state
from bnfinetune.bn.policy.spec import BNPolicy, auto_momentum
from bnfinetune.bn.policy.sync import convert_sync_bn, revert_sync_bn
from bnfinetune.bn.policy.table import describe_bn
from bnfinetune.bn.policy.updates import StatSnapshot, no_stat_updates
from bnfinetune.bn.statistics.fvcore import get_bn_modules, update_bn_stats
from bnfinetune.bn.statistics.precise import precise_bn
from bnfinetune.bn.statistics.prior_search import PriorChoice, choose_prior
from bnfinetune.bn.statistics.ranks import merge_running_stats
from bnfinetune.bn.statistics.report import PreciseBNReport

__all__ = [
    "BNPatch",
    "BNPolicy",
    "GroupNormReport",
    "PreciseBNReport",
    "PriorChoice",
    "StatSnapshot",
    "Tent",
    "absorb_bn",
    "adapt_model",
    "apply_policy",
    "auto_momentum",
    "average_networks",
    "choose_prior",
    "convert_frozen_bn",
    "convert_group_norm",
    "convert_sync_bn",
    "describe_bn",
    "domain",
    "export_domain",
    "find_bn_layers",
    "fold_bn",
    "fold_report",
    "folded",
    "freeze_bn",
    "frozen",
    "fuse_bn",
    "get_bn_modules",
    "load_bn",
    "load_policy_state",
    "merge_running_stats",
    "no_stat_updates",
    "policy_state",
    "precise_bn",
    "register_bn_class",
    "restore_bn",
    "revert_sync_bn",
    "save_bn",
    "unfold_bn",
    "unfreeze_bn",
    "update_bn_stats",
]
