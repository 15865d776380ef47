"""A timm network's classifier: finding it, and starting one whose first loss is ln C."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import nn

from bnfinetune.errors import BackboneError


def classifier_layers(model: Any) -> dict[str, Any]:
    """The layers that give one score per class, by name: linear ones or 1x1 convolutions, one for each head.

    timm names them in its configuration, to leave them out where weights are of other classes.
    """
    stated: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    named: Any = stated.get("classifier")
    if not named and (default := get_pretrained_cfg(stated.get("architecture", ""))) is not None:
        named = default.classifier  # a folder's configuration may be short
    modules = dict(model.named_modules())
    names = (named,) if isinstance(named, str) else named or ()
    return {name: modules[name] for name in names if hasattr(modules.get(name), "weight")}


def head_parameters(model: Any) -> set[int]:
    """Identities of the classifier's parameters: of timm's `get_classifier`, and of heads that it leaves out."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    modules = [head for head in heads if isinstance(head, nn.Module)] + list(classifier_layers(model).values())
    return {id(p) for module in modules for p in module.parameters()}


def is_head_zero(model: nn.Module) -> bool:
    """Whether every layer that gives scores is zero, so that all classes score 0 whatever the image."""
    parameters = [parameter for layer in classifier_layers(model).values() for parameter in layer.parameters()]
    return bool(parameters) and not any(bool(parameter.any()) for parameter in parameters)


def reset_head(model: nn.Module, num_classes: int | None = None) -> nn.Module:
    """Start a timm network's classifier anew, at zeros: the first loss is ln C, whatever the features are.

    All classes get the same score, so that cross entropy begins at `ln C`, binary cross entropy at `ln 2`. Many of
    timm's families draw weights whose deviation is near `1 / sqrt(C)` for any number of inputs; their loss begins at a
    multiple of that, and what it sends back distorts the features. The gradient of a head of zeros is not zero; that of
    what comes before it is, until the head has moved: in the first update. Zeros are what BiT and ViT fine-tune from
    (Kolesnikov et al. 2020, "Big Transfer"; Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words").

    Only the layers that give the scores change, in networks with several heads all of them. What else a classifier
    holds stays, such as the BN of LeViT's.

    Args:
        model: The network, changed in place; build optimizers afterwards.
        num_classes: C; None: as many as it has.

    Returns:
        The model.

    Raises:
        BackboneError: It has no classifier that timm knows of.
    """
    network: Any = model
    if num_classes is not None and not classifier_layers(model) and hasattr(model, "reset_classifier"):
        network.reset_classifier(num_classes)  # it was built without
    layers = classifier_layers(model)
    if not layers:
        raise BackboneError(
            f"{type(model).__name__} has no classifier that timm names in pretrained_cfg: set the weight and bias of "
            "its last layer to zero"
        )
    for layer in layers.values():
        _start(layer, num_classes or len(layer.weight))
    network.num_classes = num_classes or network.num_classes
    return model


def _start(layer: Any, num_classes: int) -> None:
    for name, old in list(layer.named_parameters(recurse=False)):
        zeros = old.new_zeros(num_classes, *old.shape[1:])
        setattr(layer, name, nn.Parameter(zeros, requires_grad=old.requires_grad))
    setattr(layer, "out_channels" if hasattr(layer, "out_channels") else "out_features", num_classes)


@torch.no_grad()
def change_classes(model: nn.Module, num_classes: int, rows: list[int] | None) -> nn.Module:
    """Give the model a new classifier, which keeps `rows` of the old one where these are given."""
    kept = {name: layer.state_dict() for name, layer in classifier_layers(model).items()}
    reset_head(model, num_classes)
    if rows is not None:
        for name, layer in classifier_layers(model).items():
            layer.load_state_dict({key: value[rows] for key, value in kept[name].items()})
    return model
