"""Synchronised BN and back, as shorthands of policies: no layer is rebuilt, so nothing of it can be lost."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnfinetune.bn.layers import Selection, select_layers
from bnfinetune.bn.policy.apply import apply_policy
from bnfinetune.bn.policy.spec import BNPolicy
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.errors import PolicyError


def convert_sync_bn(
    model: nn.Module,
    process_group: Any = None,
    *,
    group_size: int | None = None,
    layers: Selection = "*",
    exclude: Selection = (),
) -> nn.Module:
    """Lets the BN layers that normalise by their batch normalise by the joined batch of all ranks instead.

    A shorthand of `apply_policy` with `train_stats="sync"`: activations fused into layers, attributes, Parameters and
    buffers stay, and it works on the CPU too. Frozen layers stay frozen.

    Args:
        model: any module with BN layers, wrapped or not; called on every rank.
        process_group: the ranks that pool their statistics; all by default.
        group_size: consecutive ranks per group instead, such as the GPUs of one node.
        layers: globs on qualified layer names.
        exclude: globs of layers to leave as they are.

    Returns:
        The same model.

    Raises:
        SelectionError: a glob matches no BN layer.
        PolicyError: no selected layer normalises by its batch.
    """
    policy = BNPolicy(
        train_stats="sync",
        process_group=process_group,
        sync_group_size=group_size,
        layers=_names_with(model, ("batch", "sync"), layers, exclude),
    )
    return apply_policy(model, policy)


def revert_sync_bn(model: nn.Module, *, layers: Selection = "*", exclude: Selection = ()) -> nn.Module:
    """Lets synchronised BN layers normalise by their own rank's batch again.

    Args:
        model: any module with BN layers, wrapped or not; `nn.SyncBatchNorm` and timm's `SyncBatchNormAct` that were
            built as such are reverted too, and can then run on the CPU, in DDP and in exports.
        layers: globs on qualified layer names.
        exclude: globs of layers to leave as they are.

    Returns:
        The same model.

    Raises:
        SelectionError: a glob matches no BN layer.
        PolicyError: no selected layer is synchronised.
    """
    return apply_policy(model, BNPolicy(train_stats="batch", layers=_names_with(model, ("sync",), layers, exclude)))


def _names_with(model: nn.Module, train_stats: tuple[str, ...], layers: Selection, exclude: Selection) -> list[str]:
    selected = select_layers(model, layers, exclude)
    names = [name for name, layer in selected.items() if switches_of(layer).train_stats in train_stats]
    if not names:
        first, found = next(iter(selected.items()))
        raise PolicyError(
            f"none of {len(selected)} BN layers normalises by {' or '.join(train_stats)} in training "
            f"({first!r} by {switches_of(found).train_stats}); unfreeze or convert them first"
        )
    return [_literally(name) for name in names]


def _literally(name: str) -> str:
    """A glob that matches only this name."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
