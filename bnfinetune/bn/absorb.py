"""Absorbing: the scale of frozen BN layers moved into the weights of the convs before them, which train from there.

The network computes what it did but is parameterised otherwise: the optimizer steps on `W s` itself, no longer on W.
A step of SGD on W moves `W s` by `s^2` times as much as one on `W s` itself, channel by channel, and a penalty on W is
one of `1 / s^2` on `W s`; docs/parameterisation.md shows what follows.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from bnfinetune.bn.folding.arithmetic import fold_parameters, widest_dtype
from bnfinetune.bn.folding.fold import unfolded
from bnfinetune.bn.folding.layers import is_foldable
from bnfinetune.bn.folding.observed import Example
from bnfinetune.bn.folding.pairs import find_pairs
from bnfinetune.bn.layers import find_bn_layers, unwrap
from bnfinetune.bn.policy.switched_layer import state_of, switches_of
from bnfinetune.bn.policy.transition import refuse_under_ddp
from bnfinetune.bn.population import population_of
from bnfinetune.errors import LayerError, PolicyError

_log = logging.getLogger(__name__)


def absorb_bn(model: nn.Module, example_input: Example | None = None) -> nn.Module:
    """Moves the scale of frozen BN layers into the convs before them, in place, same Parameters and `state_dict` keys.

    If every input of a layer is the output of a conv that goes nowhere else, `W s` with `s = g / sqrt(v + e)` becomes
    the convs' weight, and `b + (c - m) s` their bias or, where they have none, the layer's; what is left of the layer
    has mean 0, variance 1 - e and weight 1, which no longer trains. Any other layer takes s for its weight and
    `b - m s` for its bias. The new weight and bias train if any of W, c, g and b did: make the optimizer after this.

    `fold_bn` then computes such layers at no cost, and checkpoints load into the plain network. There is no way back,
    and statistics of other data can no longer take the place of those that were absorbed.

    Args:
        model: any module whose BN layers all have fixed statistics, an affine and no domains.
        example_input: as in `fold_bn`.

    Returns:
        The same model.

    Raises:
        SelectionError: the model has no BN layer.
        PolicyError: a layer's statistics are not fixed, a DDP wrapper is somewhere in the model, or there is no input
            that the model takes, in training too.
        LayerError: a layer has no weight and bias, or shares them with another module.
    """
    layers = find_bn_layers(model)
    refuse_under_ddp(model, layers)
    shared = _shared_tensors(model)
    for name, layer in layers.items():
        _check(name, layer, shared)
    absorbed = 0
    with unfolded(model), torch.no_grad():
        pairs = find_pairs(model, layers, example_input, purpose="absorb")
        for name, layer in layers.items():
            convs = list(pairs.convs.get(name, {}).values())
            alike = len({conv.bias is None for conv in convs}) == 1
            free = not any(id(tensor) in shared for conv in convs for tensor in conv._parameters.values())
            _absorb(layer, convs if alike and free else [])
            absorbed += alike and free
    _log.info("absorbed %d of %d BN layers of %s", absorbed, len(layers), type(unwrap(model)).__name__)
    return model


def _shared_tensors(model: nn.Module) -> set[int]:
    """Parameters and buffers that more than one module holds, by id."""
    held = Counter(
        id(tensor)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    return {key for key, holders in held.items() if holders > 1}


def _check(name: str, layer: Any, shared: set[int]) -> None:
    if not is_foldable(layer):
        found = ", ".join(switches_of(layer))
        raise PolicyError(f"BN layer {name!r} has no fixed statistics to absorb ({found}); call freeze_bn(model) first")
    state = state_of(layer)
    if state is not None and state.options.domains:
        raise PolicyError(f"BN layer {name!r} has statistics of several domains, of which only one could be absorbed")
    if layer.weight is None or layer.bias is None:
        raise LayerError(f"BN layer {name!r} has no weight and bias to take what is absorbed; use fold_bn instead")
    stats = population_of(layer).require_stats()
    for key, tensor in {"weight": layer.weight, "bias": layer.bias, "running_mean": stats.mean}.items():
        if id(tensor) in shared or not (tensor is layer._parameters.get(key) or tensor is layer._buffers.get(key)):
            raise LayerError(
                f"BN layer {name!r} shares its {key} with another module or computes it, so it cannot take what is "
                "absorbed; give it a copy of its own, or use fold_bn instead"
            )


def _absorb(layer: Any, convs: list[Any]) -> None:
    """Leaves a layer mean 0 and variance 1; its scale goes into convs, or into its own weight if there are none."""
    population = population_of(layer)
    stats, eps = population.require_stats(), population.eps
    learns = any(p.requires_grad for module in (layer, *convs) for p in module.parameters(recurse=False))
    wide = widest_dtype(stats.mean)
    scale = layer.weight.to(wide) * (stats.var.to(wide) + eps).rsqrt()
    biased = any(conv.bias is not None for conv in convs)
    for conv, (weight, bias) in [(conv, fold_parameters(conv, layer, wide)) for conv in convs]:
        conv.weight.copy_(weight)
        if biased:
            conv.bias.copy_(bias)
    layer.bias.copy_(torch.zeros_like(scale) if biased else layer.bias - stats.mean * scale)
    layer.weight.copy_(torch.ones_like(scale) if convs else scale)
    stats.mean.zero_()
    stats.var.fill_(1 - eps)
    for conv in convs:
        _let_learn(conv.weight, learns)
        _let_learn(conv.bias, learns)
    _let_learn(layer.weight, learns and not convs)
    _let_learn(layer.bias, learns and not biased)


def _let_learn(tensor: Tensor | None, learns: bool) -> None:
    if isinstance(tensor, nn.Parameter) and tensor.requires_grad != learns:
        tensor.requires_grad_(learns)
        tensor.grad = None
