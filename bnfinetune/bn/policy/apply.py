"""Policies put on many layers at once and exactly undone; freezing and unfreezing as their shorthands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from bnfinetune.bn.layers import Selection, find_bn_layers, select_layers
from bnfinetune.bn.policy.affine import affine_parameters, learning_of
from bnfinetune.bn.policy.spec import BNPolicy
from bnfinetune.bn.policy.switched_layer import state_of
from bnfinetune.bn.policy.transition import LayerPlan, carry_out
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

    Examples:
        >>> apply_policy(model, [BNPolicy(train_stats="running", update_stats="none"),
        ...                      BNPolicy(train_stats="batch", update_stats="ema", layers="layer4.*")])

    Raises:
        SelectionError: a glob matches no BN layer.
        LayerError: a layer that cannot do as asked, or whose `forward` was replaced.
        PolicyError: a setting that no switch uses, or a change of `requires_grad` below a DDP wrapper.
    """
    policies = [policy] if isinstance(policy, BNPolicy) else list(policy)
    if not policies:
        raise PolicyError("apply_policy got an empty list; give at least one BNPolicy")
    plans: dict[nn.Module, LayerPlan] = {}
    meant: list[tuple[nn.Module, BNPolicy]] = []
    for each in policies:
        for name, layer in select_layers(model, each.layers, each.exclude).items():
            plan = plans.get(layer) or LayerPlan.unchanged(name, layer)
            plans[layer] = plan.with_policy(layer, each)
            meant.append((layer, each))
    for layer, each in meant:
        plans[layer].check_use(each)
    carry_out(model, plans)
    return model


def restore_bn(model: nn.Module) -> nn.Module:
    """Undoes every policy: class, momentum, eps and `requires_grad` of before the first; trained values stay.

    Modes (`training`) stay as they are.

    Args:
        model: any module with BN layers, under policies or not.

    Returns:
        The same model.

    Raises:
        SelectionError: the model has no BN layer.
        LayerError: a layer whose `forward` was replaced meanwhile.
        PolicyError: a change of `requires_grad` below a DDP wrapper.
    """
    carry_out(model, {}, undone=find_bn_layers(model).values())
    return model


def freeze_bn(
    model: nn.Module, *, stats: bool = True, affine: bool = True, layers: Selection = "*", exclude: Selection = ()
) -> nn.Module:
    """Freezes BN layers so that it holds through `train()`: a shorthand of `apply_policy`.

    Whatever weight and bias are computed from (pruned, weight-normalised, parametrised) is frozen, and statistics stay
    through `reset_running_stats` and torch's `update_bn` too.

    Args:
        model: any module with BN layers.
        stats: normalise with the running statistics in training too, and never update them.
        affine: train neither weight nor bias.
        layers: globs on qualified layer names.
        exclude: globs of layers to leave as they are.

    Returns:
        The same model.

    Raises:
        SelectionError: a glob matches no BN layer.
        LayerError: a layer without running statistics, or whose `forward` was replaced.
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
            exclude=exclude,
        ),
    )


def unfreeze_bn(
    model: nn.Module, *, stats: bool = True, affine: bool = True, layers: Selection = "*", exclude: Selection = ()
) -> nn.Module:
    """Brings back the switches of before the freeze; layers built frozen become plain BN.

    Args:
        model: any module with BN layers.
        stats: bring back what normalised and whether it was updated.
        affine: bring back which of weight and bias learnt.
        layers: globs on qualified layer names.
        exclude: globs of layers to leave as they are.

    Returns:
        The same model; layers that are not frozen stay as they are.

    Raises:
        SelectionError: a glob matches no BN layer.
        PolicyError: neither `stats` nor `affine`, or a change of `requires_grad` below a DDP wrapper.
    """
    _require_part("unfreeze_bn", stats, affine)
    plans: dict[nn.Module, LayerPlan] = {}
    for name, layer in select_layers(model, layers, exclude).items():
        plan = LayerPlan.unchanged(name, layer)
        plans[layer] = plan.unfrozen(layer, stats=stats, affine=affine)
    carry_out(model, plans)
    return model


@contextmanager
def frozen(
    model: nn.Module, *, stats: bool = True, affine: bool = True, layers: Selection = "*", exclude: Selection = ()
) -> Iterator[nn.Module]:
    """Within this context BN layers are frozen, as by `freeze_bn`; afterwards they are exactly what they were.

    They go back to the policy that they were under when the context began, or to none, with an error too and whatever
    happened to their policies within; values that training changed stay. Gradients that weight and bias had
    accumulated are set aside meanwhile. Contexts nest.

    Args:
        model: any module with BN layers, wrapped or not, under a policy or not.
        stats: normalise with the running statistics in training too, and never update them.
        affine: train neither weight nor bias.
        layers: globs on qualified layer names.
        exclude: globs of layers to leave as they are.

    Examples:
        >>> with frozen(model, layers="layer1.*"):
        ...     train_one_epoch(model)

    Raises:
        SelectionError: a glob matches no BN layer.
        LayerError: a layer without running statistics, or whose `forward` was replaced.
        PolicyError: neither `stats` nor `affine`, or a change of `requires_grad` below a DDP wrapper.
    """
    selected: dict[str, Any] = select_layers(model, layers, exclude)
    before = {
        layer: LayerPlan(state, layer.momentum, learning_of(layer))
        for layer in selected.values()
        if (state := state_of(layer)) is not None
    }
    gradients = {own: own.grad for layer in selected.values() for own in affine_parameters(layer) if affine}
    freeze_bn(model, stats=stats, affine=affine, layers=layers, exclude=exclude)
    try:
        yield model
    finally:
        carry_out(model, before, undone=[layer for layer in selected.values() if layer not in before])
        for own, gradient in gradients.items():
            own.grad = gradient if own.grad is None else own.grad


def _require_part(name: str, stats: bool, affine: bool) -> None:
    if not (stats or affine):
        raise PolicyError(f"{name} with stats=False and affine=False would do nothing; leave one of them True")
