"""From BN to the frozen classes of torchvision and timm, for code that looks for these, such as that of detectors.

Policies freeze layers in place and can be undone, so nothing here is needed to train with frozen BN. This is the way
out: what it leaves needs no `bnfinetune` to be built, pickled or loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bnfinetune.bn.class_probe import takes_images
from bnfinetune.bn.layers import (
    Selection,
    _drop_and_act,
    _no_tail,
    native_class,
    replace_modules,
    require_bare,
    require_known,
    select_layers,
)
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.bn.policy.transition import carry_out
from bnfinetune.bn.population import Population, population_of
from bnfinetune.errors import LayerError


@torch.no_grad()
def convert_frozen_bn(model: nn.Module, *, layers: Selection = "*", exclude: Selection = ()) -> nn.Module:
    """Replaces BN layers by `torchvision.ops.FrozenBatchNorm2d`, which always computes what BN does in evaluation.

    Layers with an activation or dropout of their own become timm's `FrozenBatchNormAct2d`, with these same modules.
    Names stay: a checkpoint of the model from before loads with `strict=True`, and the other way round. Weight and bias
    become buffers, ones and zeros where there are none, so make the optimizer after this. Policies and folding on these
    layers are undone; statistics and affine are those of the domain in use. If anything is refused, nothing has
    changed.

    Args:
        model: any bare module with BN layers for images (N, C, H, W), under policies or not, folded or not.
        layers: globs on qualified layer names, classes or functions of name and layer.
        exclude: the same, of layers to leave as they are.

    Returns:
        The same model, or a new layer if the model itself is a BN layer.

    Examples:
        >>> convert_frozen_bn(model, layers=nn.BatchNorm2d)

    Raises:
        SelectionError: a selector matches no BN layer.
        LayerError: a layer that does not take images, keeps no running statistics, evaluates with others, or does
            something else after normalising.
        PolicyError: a model that is wrapped, or holds a DDP wrapper.
    """
    require_bare(model, "convert_frozen_bn")
    selected = select_layers(model, layers, exclude)
    frozen = {layer: _frozen(name, layer) for name, layer in selected.items()}
    carry_out(model, {}, undone=selected.values())
    return replace_modules(model, frozen)


def _frozen(name: str, layer: Any) -> nn.Module:
    obstacle = _obstacle(name, layer)
    if obstacle:
        cls = native_class(layer).__name__
        raise LayerError(f"BN layer {name!r}, a {cls}, {obstacle}, so it cannot become a FrozenBatchNorm2d; exclude it")
    population = population_of(layer)
    fused = {key: layer._modules.get(key) for key in ("drop", "act")}
    frozen: nn.Module = _without_tensors(population, fused)
    mean, var, _ = population.require_stats()
    weight, bias = population.affine
    values = {
        "weight": torch.ones_like(mean) if weight is None else weight,
        "bias": torch.zeros_like(mean) if bias is None else bias,
        "running_mean": mean,
        "running_var": var,
    }
    frozen._buffers.update({key: value.detach().clone() for key, value in values.items()})
    return frozen.train(layer.training)


def _obstacle(name: str, layer: Any) -> str | None:
    """Why a layer cannot be replaced."""
    if require_known(layer, name).tail not in (_no_tail, _drop_and_act):
        return "does something of its own after normalising"
    eval_stats = switches_of(layer).eval_stats
    if eval_stats != "running":
        return f"evaluates with other statistics than the running ones (eval_stats={eval_stats!r})"
    if not takes_images(native_class(layer), layer):
        return "does not take images (N, C, H, W)"
    return None


def _without_tensors(population: Population, fused: dict[str, nn.Module | None]) -> Any:
    """The new layer, its tensors still to be set; timm's if anything follows normalising.

    Neither package is imported by models that do without.
    """
    channels = len(population.require_stats().mean)
    if all(isinstance(module, nn.Identity | None) for module in fused.values()):
        from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-untyped]

        return FrozenBatchNorm2d(channels, population.eps)
    from timm.layers import FrozenBatchNormAct2d

    frozen = FrozenBatchNormAct2d(channels, population.eps, apply_act=False)
    for key, module in fused.items():
        if module is not None:
            setattr(frozen, key, module)
    return frozen
