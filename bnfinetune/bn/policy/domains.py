"""Domain-specific BN (Chang et al. 2019): several populations through one model, each with its own statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bnfinetune.bn.layers import find_bn_layers, unwrap
from bnfinetune.bn.policy.added import added_tensors
from bnfinetune.bn.policy.apply import restore_bn
from bnfinetune.bn.policy.switched_layer import state_of
from bnfinetune.bn.population import AFFINE, STATS, domain_key
from bnfinetune.errors import SelectionError


@contextmanager
def domain(model: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """Within this context, BN layers use and update the statistics of one domain, in either mode.

    Domains are declared by `BNPolicy(domains=..., domain_affine=...)`. With gradient checkpointing, run the backward of
    one domain before the forward of the next.

    Args:
        model: any module with BN layers, wrapped or not.
        name: a domain; None for the layers' own statistics, as outside of any context.

    Examples:
        >>> apply_policy(model, BNPolicy(domains="target"))
        >>> with domain(model, "target"):
        ...     loss = loss_fn(model(target_images), target_labels)

    Raises:
        SelectionError: no domain of this name has been declared.
    """
    layers = _layers_of_domain(model, name)
    before = [(layer, layer._bn_domain) for layer in layers]
    for layer, _ in before:
        layer._bn_domain = name
    try:
        yield model
    finally:
        for layer, previous in before:
            if state_of(layer) is not None:
                layer._bn_domain = previous


def _layers_of_domain(model: nn.Module, name: str | None) -> list[Any]:
    layers = list(find_bn_layers(model).values())
    if name is None:
        return [layer for layer in layers if state_of(layer)]
    declared = {known for layer in layers if (state := state_of(layer)) for known in state.options.domains}
    if name not in declared:
        known = ", ".join(sorted(declared)) or "none"
        raise SelectionError(f"no domain {name!r}; declared are {known}; add it by BNPolicy(domains={name!r})")
    return [layer for layer in layers if (state := state_of(layer)) and name in state.options.domains]


def export_domain(model: nn.Module, name: str) -> nn.Module:
    """A plain copy of a model that computes in evaluation what the model does within `domain(model, name)`.

    Args:
        model: a model with that domain.
        name: the domain.

    Returns:
        A bare deep copy without any policy, whose `state_dict` has the original keys; the model stays as it is.

    Raises:
        SelectionError: no such domain.
    """
    layers = find_bn_layers(model)
    if not any((state := state_of(layer)) and name in state.options.domains for layer in layers.values()):
        raise SelectionError(f"no domain {name!r} in this model; declare it by BNPolicy(domains={name!r}) and train it")
    plain = copy.deepcopy(unwrap(model))
    with torch.no_grad():
        for layer in find_bn_layers(plain).values():
            added = added_tensors(layer)
            for key in (*STATS, *AFFINE):
                if domain_key(name, key) in added:
                    getattr(layer, key).copy_(added[domain_key(name, key)])
    return restore_bn(plain)
