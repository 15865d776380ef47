"""Policies put on many layers at once and exactly undone; freezing and unfreezing as their shorthands."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bnfinetune.bn.layers import Selection, find_bn_layers, select_layers, unwrap
from bnfinetune.bn.policy.spec import BNPolicy
from bnfinetune.bn.policy.transition import LayerPlan, carry_out, undo
from bnfinetune.errors import PolicyError


def apply_policy(model: nn.Module, policy: BNPolicy | Sequence[BNPolicy]) -> nn.Module:
    """Puts BN layers under a policy, in place; policies compose, and `restore_bn` undoes them all.

    The layers stay the same module objects and instances of their class, with the same Parameters; `state_dict`
    keeps its keys, shapes and values. If anything is refused, nothing has changed.

    Args:
        model: any module with BN layers, wrapped (DDP, `torch.compile`) or not.
        policy: one policy, or several, of which later ones win where they overlap.

    Returns:
        The same model.

    Example:
        >>> apply_policy(model, [BNPolicy(train_stats="running", update_stats="none"),
        ...                      BNPolicy(train_stats="batch", update_stats="ema", layers="layer4.*")])

    Raises:
        SelectionError: a glob matches no BN layer.
        LayerError: a layer that cannot do as asked.
        PolicyError: a change of `requires_grad` below a DDP wrapper.
    """
    policies = [policy] if isinstance(policy, BNPolicy) else list(policy)
    if not policies:
        raise PolicyError("apply_policy got an empty list; give at least one BNPolicy")
    plans: dict[nn.Module, LayerPlan] = {}
    for each in policies:
        for name, layer in select_layers(model, each.layers, each.exclude).items():
            plan = plans.get(layer) or LayerPlan.unchanged(name, layer, unwrap(model).training)
            plans[layer] = plan.with_policy(layer, each)
    carry_out(model, plans)
    return model


def restore_bn(model: nn.Module) -> nn.Module:
    """Undoes every policy: class, momentum, eps and `requires_grad` of before the first; trained values stay.

    Layers take the model's present mode, except one whose mode had been set apart before the first policy.

    Args:
        model: any module with BN layers, under policies or not.

    Returns:
        The same model.

    Raises:
        SelectionError: the model has no BN layer.
        PolicyError: a change of `requires_grad` below a DDP wrapper.
    """
    undo(find_bn_layers(model).values(), model)
    return model


def freeze_bn(model: nn.Module, *, stats: bool = True, affine: bool = True, layers: Selection = "*") -> nn.Module:
    """Freezes BN layers so that it holds through `train()`: a shorthand of `apply_policy`.

    Args:
        model: any module with BN layers.
        stats: normalise with the running statistics in training too, and never update them.
        affine: train neither weight nor bias.
        layers: globs on qualified layer names.

    Returns:
        The same model.

    Raises:
        SelectionError: a glob matches no BN layer.
        LayerError: a layer without running statistics.
        PolicyError: neither `stats` nor `affine`, or a change of `requires_grad` below a DDP wrapper.
    """
    _require_part("freeze_bn", stats, affine)
    return apply_policy(
        model,
        BNPolicy(
            train_stats="running" if stats else None,
            update_stats="none" if stats else None,
            affine="frozen" if affine else None,
            layers=layers,
        ),
    )


def unfreeze_bn(model: nn.Module, *, stats: bool = True, affine: bool = True, layers: Selection = "*") -> nn.Module:
    """Brings back the switches of before the freeze; layers built frozen become plain BN.

    Args:
        model: any module with BN layers.
        stats: bring back what normalised and whether it was updated.
        affine: bring back which of weight and bias learnt.
        layers: globs on qualified layer names.

    Returns:
        The same model; layers that are not frozen stay as they are.

    Raises:
        SelectionError: a glob matches no BN layer.
        PolicyError: neither `stats` nor `affine`, or a change of `requires_grad` below a DDP wrapper.
    """
    _require_part("unfreeze_bn", stats, affine)
    plans: dict[nn.Module, LayerPlan] = {}
    for name, layer in select_layers(model, layers).items():
        plan = LayerPlan.unchanged(name, layer, unwrap(model).training)
        plans[layer] = plan.unfrozen(layer, stats=stats, affine=affine)
    carry_out(model, plans)
    return model


def _require_part(name: str, stats: bool, affine: bool) -> None:
    if not (stats or affine):
        raise PolicyError(f"{name} with stats=False and affine=False would do nothing; leave one of them True")
