"""Policies on disk: what a `state_dict` does not carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.policy.added import added_tensors, needed_shape, needed_tensors
from bnfinetune.bn.policy.affine import learning_of
from bnfinetune.bn.policy.rank_groups import GroupChoice
from bnfinetune.bn.policy.spec import check_domain_name, check_setting
from bnfinetune.bn.policy.state import LayerState, Learning, Options
from bnfinetune.bn.policy.switched_layer import state_of
from bnfinetune.bn.policy.transition import LayerPlan, carry_out
from bnfinetune.bn.population import AFFINE
from bnfinetune.errors import LayerError, PolicyError, SelectionError

_VERSION = 2
_PLAIN = ("train_stats", "updates", "eval_stats", "stats_before", "affine_frozen", "affine_before", "ema_momentum")
_KEYS = {*_PLAIN, "options", "momentum", "learning", "tensors"}


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
        "learning": learning_of(layer),
        "tensors": {name: tensor.detach().clone() for name, tensor in added_tensors(layer).items()},
    }


def load_policy_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Puts a model under the very policies that `policy_state` has read off another or an earlier one.

    Layers that had no policy then are restored. Afterwards the model computes, trains and updates as the other did,
    given the same `state_dict`. `restore_bn` leads back to what this model was before its own first policy. All is
    checked before the first layer changes: what is refused has changed nothing.

    Args:
        model: a model with the same BN layers, wrapped or not.
        state: what `policy_state` returned.

    Raises:
        SelectionError: the state holds a layer that the model has not.
        LayerError: a layer that cannot do as the state says, or whose `forward` was replaced.
        PolicyError: the state is no policy state, or damaged, or of another version or model, or would change
            `requires_grad` below a DDP wrapper.
    """
    saved = state.get("layers") if isinstance(state, Mapping) else None
    if not isinstance(saved, Mapping) or state.get("version") != _VERSION:
        found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise PolicyError(f"this is no policy state of version {_VERSION} (found {found!r}); save it anew")
    layers = find_bn_layers(model)
    foreign = [name for name in saved if name not in layers]
    if foreign:
        raise SelectionError(
            f"the policy state holds {foreign[0]!r}, no BN layer of this model; build the same model first"
        )
    plans = {layers[name]: _plan(name, layers[name], entry) for name, entry in saved.items()}
    carry_out(model, plans, undone=[layer for name, layer in layers.items() if name not in saved])
    with torch.no_grad():
        for name, entry in saved.items():
            for key, tensor in added_tensors(layers[name]).items():
                tensor.copy_(entry["tensors"][key])


def _plan(name: str, layer: nn.Module, entry: Any) -> LayerPlan:
    now = LayerPlan.unchanged(name, layer)
    try:
        _require(isinstance(entry, Mapping) and entry.keys() == _KEYS, f"its keys are not {', '.join(sorted(_KEYS))}")
        plain = {key: _as_tuple(entry[key]) for key in _PLAIN}
        _check_plain(plain, entry["momentum"])
        options = _options(entry["options"], now.state.options)
        for learning in (entry["learning"], *([] if plain["affine_before"] is None else [plain["affine_before"]])):
            _check_learning(learning, learning_of(layer), now.state.original.learning)
        planned = replace(
            now,
            state=replace(now.state, **plain, options=options),
            momentum=entry["momentum"],
            learning=entry["learning"],
        )
        planned.check_running_stats(layer)
        _check_tensors(layer, planned.state, entry["tensors"])
    except LayerError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PolicyError(
            f"the policy state of BN layer {name!r} is damaged or of another model: {error}; save it anew"
        ) from error
    return planned


def _check_plain(plain: Mapping[str, Any], momentum: Any) -> None:
    pairs = [(plain["train_stats"], plain["updates"])]
    pairs += [] if plain["stats_before"] is None else [plain["stats_before"]]
    for train_stats, updates in pairs:
        check_setting("train_stats", train_stats)
        _require(isinstance(updates, bool), f"updates={updates!r} is neither true nor false")
    check_setting("eval_stats", plain["eval_stats"])
    _require(isinstance(plain["affine_frozen"], bool), f"affine_frozen={plain['affine_frozen']!r} is no truth value")
    check_setting("momentum", plain["ema_momentum"])
    if momentum is not None:
        check_setting("momentum", momentum)


def _options(saved: Mapping[str, Any], present: Options) -> Options:
    names = {option.name for option in fields(Options)}
    _require(saved.keys() == names, f"its options are not {', '.join(sorted(names))}")
    for name in names - {"domains", "ranks"}:
        check_setting(name, saved[name])
    domains = _as_tuple(saved["domains"])
    _require(isinstance(domains, tuple), f"domains={domains!r} is no list")
    for domain in domains:
        check_domain_name(domain)
    size, given = saved["ranks"]["size"], saved["ranks"]["given"]
    if size is not None:
        check_setting("sync_group_size", size)
    given_anew = given and present.ranks.process_group is not None
    ranks = present.ranks if given_anew else GroupChoice(None, size, bool(given))
    return Options(**{**saved, "domains": domains, "ranks": ranks})


def _check_learning(saved: Learning, present: Learning, original: Learning) -> None:
    tensors, known = set(saved).intersection(AFFINE), set(present).intersection(AFFINE)
    _require(tensors == known, f"it has {sorted(tensors)} where the layer has {sorted(known)}")
    for tensor, flags in saved.items():
        _require(all(isinstance(flag, bool) for flag in flags.values()), f"{tensor} learns by {flags!r}")
        _require(bool(flags) or not original.get(tensor), f"its {tensor} is a buffer where the layer has a Parameter")


def _check_tensors(layer: nn.Module, state: LayerState, saved: Mapping[str, Tensor]) -> None:
    needed = needed_tensors(layer, state)
    _require(saved.keys() == needed.keys(), f"its tensors are not {', '.join(needed) or 'none'}")
    for key, source in needed.items():
        shape, found = tuple(needed_shape(layer, source)), saved[key]
        fits = isinstance(found, Tensor) and tuple(found.shape) == shape and not found.is_complex()
        _require(fits and not found.is_meta, f"{key} is no tensor with values and the shape {shape}")
    on_meta = any(
        tensor.is_meta for tensor in (*layer._buffers.values(), *layer._parameters.values()) if tensor is not None
    )
    _require(not (needed and on_meta), "the layer is on the meta device, where values would be lost (load them later)")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise PolicyError(otherwise)


def _as_tuple(value: Any) -> Any:
    """Undoes what a trip through JSON does to tuples."""
    return tuple(value) if isinstance(value, list) else value
