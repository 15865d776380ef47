"""Facts about a set-up that more than one rule needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bnfinetune.diagnose.case import Case

FEW_IMAGES = 8
"""Fewer images than this say too little about statistics."""


def trains_only_head(case: Case) -> bool:
    """Whether no parameter outside the classifier trains, so that the network serves as a fixed encoder."""
    head_parameters = {
        id(parameter)
        for module in case.bare.modules()
        if id(module) in case.head
        for parameter in module.parameters(recurse=False)
    }
    return not any(p.requires_grad for p in case.bare.parameters() if id(p) not in head_parameters)


def is_untouched(layer: Any) -> bool:
    """Whether the running statistics are still those of construction: mean 0, variance 1."""
    mean, var = layer.running_mean, layer.running_var
    return mean is not None and not mean.any() and bool((var == 1).all())


def bn_parameters(case: Case) -> dict[str, nn.Parameter]:
    """Weights and biases of BN layers by qualified name; buffers of frozen classes are none."""
    return {
        f"{layer}.{key}" if layer else key: parameter
        for layer, module in case.layers.items()
        for key, parameter in module.named_parameters(recurse=False)
    }


def rebuilt_optimizer(optimizer: torch.optim.Optimizer | None) -> str:
    """Source text of an optimizer of the same kind over `bnf.param_groups`."""
    if optimizer is None:
        return "optimizer = torch.optim.AdamW(bnf.param_groups(model, weight_decay=0.05), lr=1e-3)"
    cls, groups = type(optimizer), optimizer.param_groups
    name = f"torch.optim.{cls.__name__}" if hasattr(torch.optim, cls.__name__) else "type(optimizer)"
    decay = max(group.get("weight_decay", 0.0) for group in groups)
    rate = max(group.get("initial_lr", group["lr"]) for group in groups)
    momentum = f", momentum={groups[0]['momentum']:g}" if groups[0].get("momentum") else ""
    return f"optimizer = {name}(bnf.param_groups(model, weight_decay={decay:g}), lr={float(rate):g}{momentum})"
