"""What policies add to a layer: statistics and affine of domains, renorm's age, a counter where a class has none.

All of it are non-persistent buffers and Parameters that `state_dict` does not carry. Their names are noted with the
layer, so that nothing else is ever taken away.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.nn.utils.parametrize import is_parametrized

from bnfinetune.bn.policy.state import LayerState
from bnfinetune.bn.population import AFFINE, RENORM_AGE, STATS, domain_key
from bnfinetune.errors import LayerError

ATTRIBUTES = ("_bn_added", "_bn_unset")
"""Plain attributes: the names of what was added, and whether it waits for the layer to get values."""

_ZERO = ""  # what starts as the number 0 and not from a tensor of the layer


def needed_tensors(layer: nn.Module, state: LayerState) -> dict[str, str]:
    """Names of what a state needs beyond the layer's own tensors, each with the name of the one that it starts from."""
    options = state.options
    needed = {"num_batches_tracked": _ZERO} if "num_batches_tracked" in state.original.added else {}
    counted = bool(needed) or has_tensor(layer, "num_batches_tracked")
    stats = [name for name in STATS if name != "num_batches_tracked" or counted]
    affine = [name for name in AFFINE if has_tensor(layer, name)]
    for domain in options.domains:
        own = [*stats, *affine] if options.domain_affine == "own" else stats
        needed |= {domain_key(domain, name): name for name in own}
    if state.train_stats == "renorm" and (options.renorm_warmup or options.renorm_ramp):
        needed[RENORM_AGE] = _ZERO
    return needed


def has_tensor(layer: nn.Module, name: str) -> bool:
    """Whether a layer has a tensor of a name, which is not computed: spectral normalisation would move by that."""
    for held in (layer._parameters, layer._buffers):
        if name in held:
            return held[name] is not None
    return is_parametrized(layer, name) or getattr(layer, name, None) is not None


def needed_shape(layer: Any, source: str) -> torch.Size:
    """The shape of a needed tensor that starts from `source`."""
    return torch.Size() if source in (_ZERO, "num_batches_tracked") else getattr(layer, source).shape


def added_names(layer: nn.Module) -> dict[str, str]:
    """What policies have added to a layer, as in `needed_tensors`."""
    added: dict[str, str] = vars(layer).get("_bn_added", {})
    return added


def added_affine(layer: nn.Module) -> dict[str, str]:
    """The added names of weights and biases that domains have of their own."""
    return {name: source for name, source in added_names(layer).items() if source in AFFINE}


def added_tensors(layer: Any) -> dict[str, Tensor]:
    """The tensors that policies have added to a layer."""
    if added_names(layer) and layer._bn_unset:
        start_added(layer)
    return {name: getattr(layer, name) for name in added_names(layer)}


def check_names(layer: nn.Module, state: LayerState) -> None:
    """Refuses a state that would add or take away what is not the policy's.

    Raises:
        LayerError: a name is taken, or what goes away has been pruned or parametrised meanwhile.
    """
    needed, added = needed_tensors(layer, state), added_names(layer)
    for name in needed.keys() - added.keys():
        if has_tensor(layer, name):
            raise LayerError(f"BN layer {state.name!r} has a {name!r} already, which the policy needs; rename that")
        if needed[name] in AFFINE and _offload_hooks(layer):
            raise LayerError(_offloaded(state.name, name))
    check_removal(layer, state.name, added.keys() - needed.keys())


def check_removal(layer: nn.Module, layer_name: str, names: Iterable[str]) -> None:
    """Refuses to take away what others rely on meanwhile.

    Raises:
        LayerError: an added weight or bias has been pruned or parametrised, or a hook of accelerate wants it back.
    """
    for name in names:
        if name not in layer._parameters and name not in layer._buffers:
            raise LayerError(
                f"BN layer {layer_name!r} computes {name!r}, which goes away, from others; undo that first "
                f"(prune.remove, remove_parametrizations)"
            )
        if any(name in getattr(hook, "original_devices", ()) for hook in _offload_hooks(layer)):
            raise LayerError(_offloaded(layer_name, name))


def _offload_hooks(layer: nn.Module) -> list[Any]:
    """The hooks of accelerate that keep a layer's tensors elsewhere between its forwards, by the names they had."""
    hook = vars(layer).get("_hf_hook")
    return [each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)]


def _offloaded(layer_name: str, tensor: str) -> str:
    return (
        f"BN layer {layer_name!r} is offloaded by accelerate, which would miss {tensor!r}; take the hooks off "
        f"(remove_hook_from_submodules), change the policy, and offload again"
    )


def fit_added(layer: Any, state: LayerState) -> None:
    """Adds what a state needs, and takes away what an earlier one has added and this one does not need."""
    needed, added = needed_tensors(layer, state), added_names(layer)
    for name in added.keys() - needed.keys():
        delattr(layer, name)
    for name, source in needed.items():
        if name in added:
            continue
        start = _start(layer, source)
        if source in AFFINE:
            learns = getattr(layer, source).requires_grad and not state.affine_frozen
            layer.register_parameter(name, Parameter(start, requires_grad=learns))
        else:
            layer.register_buffer(name, start, persistent=False)
        layer._bn_unset = layer._bn_unset or start.is_meta
    layer._bn_added = needed


def start_added(layer: Any) -> None:
    """Lets what was added on the meta device start from the layer's tensors, as soon as these have values."""
    if layer.running_mean.is_meta:
        return
    with torch.no_grad():
        for name, source in added_names(layer).items():
            start, present = _start(layer, source), getattr(layer, name)
            if not present.is_meta:
                present.copy_(start)
            elif source in AFFINE:
                layer._parameters[name] = Parameter(start, requires_grad=present.requires_grad)
            else:
                layer._buffers[name] = start
    layer._bn_unset = False


def _start(layer: Any, source: str) -> Tensor:
    if source == _ZERO:
        return torch.zeros((), dtype=torch.long, device=layer.running_mean.device)
    tensor: Tensor = getattr(layer, source)
    return tensor.detach().clone()


def remove_added(layer: Any) -> None:
    """Takes away everything that policies have added."""
    for name in added_names(layer):
        delattr(layer, name)
    for name in ATTRIBUTES:
        delattr(layer, name)
