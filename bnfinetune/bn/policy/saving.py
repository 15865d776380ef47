"""Policies on disk: what a `state_dict` does not carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from bnfinetune.bn.layers import find_bn_layers, unwrap
from bnfinetune.bn.policy.rank_groups import GroupChoice
from bnfinetune.bn.policy.state import LayerState, Options
from bnfinetune.bn.policy.switched_layer import extra_tensors, state_of, trainable
from bnfinetune.bn.policy.transition import LayerPlan, carry_out, undo
from bnfinetune.errors import PolicyError, SelectionError

_VERSION = 1
_PLAIN = ("train_stats", "updates", "eval_stats", "stats_before", "affine_before", "ema_momentum")


def policy_state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model's policies that its `state_dict` does not carry.

    Args:
        model: any module with BN layers, wrapped or not.

    Returns:
        A dict of plain values and tensors, which `torch.save` writes and `torch.load(weights_only=True)` reads:
        switches, momentum and `requires_grad` of each layer under a policy, and the tensors that policies added (the
        statistics of domains, renorm's age). A process group is not part of it.

    Raises:
        SelectionError: the model has no BN layer.
    """
    held = {name: layer for name, layer in find_bn_layers(model).items() if state_of(layer) is not None}
    return {"version": _VERSION, "layers": {name: _saved(layer) for name, layer in held.items()}}


def _saved(layer: Any) -> dict[str, Any]:
    state: LayerState = layer._bn_state
    ranks = state.options.ranks
    options = {option.name: getattr(state.options, option.name) for option in fields(Options)}
    options["ranks"] = {"size": ranks.size, "given": ranks.lost or ranks.process_group is not None}
    return {
        **{name: getattr(state, name) for name in _PLAIN},
        "options": options,
        "momentum": layer.momentum,
        "trainable": trainable(layer),
        "tensors": {name: tensor.detach().clone() for name, tensor in extra_tensors(layer).items()},
    }


def load_policy_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Puts a model under the very policies that `policy_state` has read off another or an earlier one.

    Layers that had no policy then are restored. Afterwards the model computes, trains and updates as the other did,
    given the same `state_dict`. `restore_bn` leads back to what this model was before its own first policy.

    Args:
        model: a model with the same BN layers, wrapped or not.
        state: what `policy_state` returned.

    Raises:
        SelectionError: the state holds a layer that the model has not.
        PolicyError: the state is no policy state, or is of a later version, or would change `requires_grad` below a
            DDP wrapper.
    """
    saved = state.get("layers")
    if state.get("version") != _VERSION or not isinstance(saved, Mapping):
        raise PolicyError(
            f"this is no policy state of version {_VERSION} (found {state.get('version')!r}); save it anew"
        )
    layers, mode = find_bn_layers(model), unwrap(model).training
    foreign = [name for name in saved if name not in layers]
    if foreign:
        raise SelectionError(
            f"the policy state holds {foreign[0]!r}, no BN layer of this model; build the same model first"
        )
    carry_out(model, {layers[name]: _plan(name, layers[name], entry, mode) for name, entry in saved.items()})
    undo({layer for name, layer in layers.items() if name not in saved}, model)
    with torch.no_grad():
        for name, entry in saved.items():
            for key, tensor in extra_tensors(layers[name]).items():
                tensor.copy_(entry["tensors"][key])


def _plan(name: str, layer: nn.Module, entry: Mapping[str, Any], mode: bool) -> LayerPlan:
    now = LayerPlan.unchanged(name, layer, mode)
    plain: dict[str, Any] = {key: _as_tuple(entry[key]) for key in _PLAIN}
    options = {key: _as_tuple(value) for key, value in entry["options"].items()}
    saved, present = entry["options"]["ranks"], now.state.options.ranks
    given_anew = saved["given"] and present.process_group is not None
    options["ranks"] = present if given_anew else GroupChoice(None, saved["size"], saved["given"])
    state = replace(now.state, **plain, options=Options(**options))
    return replace(now, state=state, momentum=entry["momentum"], trainable=_as_tuple(entry["trainable"]))


def _as_tuple(value: Any) -> Any:
    """Undoes what a trip through JSON does to tuples."""
    return tuple(value) if isinstance(value, list) else value
