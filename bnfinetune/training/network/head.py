"""A timm network's classifier: finding it, and making one for other classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def head_parameters(model: Any) -> set[int]:
    """Identities of the classifier's parameters, found through timm's `get_classifier`."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    return {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}


def fit_head(model: Any, num_classes: int, rows: list[int] | None) -> nn.Module:
    """Give the model a new classifier; a linear one starts from `rows` of the old one where these are given."""
    old = model.get_classifier()
    model.reset_classifier(num_classes)
    new = model.get_classifier()
    if rows is not None and isinstance(old, nn.Linear) and isinstance(new, nn.Linear):
        with torch.no_grad():
            new.weight.copy_(old.weight[rows])
            new.bias.copy_(old.bias[rows])
    fitted: nn.Module = model
    return fitted
