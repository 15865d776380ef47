"""Fusing: BN layers taken out of a model for good, for deployment or to train the absorbed weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from bnfinetune.bn.folding.arithmetic import fold_parameters, widest_dtype
from bnfinetune.bn.folding.fold import unfolded
from bnfinetune.bn.folding.observed import Example, evaluating, example_arguments
from bnfinetune.bn.folding.pairs import Pairs, find_pairs
from bnfinetune.bn.folding.soundness import check_that_none_is_called, differing_pairs, refuse_quantised
from bnfinetune.bn.layers import (
    Tail,
    _drop_and_act,
    _no_tail,
    find_bn_layers,
    require_known,
    unwrap,
    walk_modules,
)
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.bn.population import population_of
from bnfinetune.errors import LayerError, PolicyError

_log = logging.getLogger(__name__)


class ChannelScale(nn.Module):
    """`x * weight + bias` for each channel: what is left of a BN layer that no conv could absorb.

    Args:
        weight: (C,).
        bias: (C,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = Parameter(weight)
        self.bias = Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scales and shifts a batch (N, C, ...), and keeps its dtype."""
        shape = (-1, *[1] * (x.ndim - 2))
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        return str(self.weight.numel())


class _Tail(nn.Module):
    """What a registered BN class applies after normalising, with whatever the layer holds for it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        gone = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
        kept = {key: value for key, value in vars(layer).items() if key not in vars(self) and key[:4] != "_bn_"}
        vars(self).update(kept, applied=require_known(layer).tail, _modules=layer._modules)
        self._parameters.update({key: value for key, value in layer._parameters.items() if key not in gone})
        self._buffers.update({key: value for key, value in layer._buffers.items() if key not in gone})

    def forward(self, x: Tensor) -> Tensor:
        applied: Tail = vars(self)["applied"]
        return applied(self, x)


def fuse_bn(model: nn.Module, example_input: Example | None = None) -> nn.Module:
    """Takes every BN layer out of a model, in place and for good: what it computes in evaluation stays the same.

    A layer that alone reads the outputs of the convs before it is absorbed into their weight and bias, which become new
    Parameters; any other, as in pre-activation networks, becomes a `ChannelScale`. Fused activations stay. Pairs are
    looked for at several image sizes, since some paths depend on it, and each is compared before and after on the
    example input; what the model as a whole returns may be ragged, empty or random. `fold_bn` is the counterpart that
    keeps Parameters and `state_dict`, checks itself in each forward and can be undone.

    Args:
        model: any module with BN layers, in training or not, under policies, folded or not.
        example_input: a tensor, a sequence of positional or a mapping of named arguments of the model; by default
            noise of timm's `pretrained_cfg["input_size"]`.

    Returns:
        The same model, without BN layers. Make its optimizer after this. A new Parameter trains if anything trained
        that it was computed from.

    Raises:
        SelectionError: the model has no BN layer.
        LayerError: a layer does not normalise with running statistics in evaluation, or is called by code that holds it
            outside of the module's children; or the model is made for quantisation-aware training.
        PolicyError: the model is wrapped in DDP, or there is no input that it takes.
    """
    layers = find_bn_layers(model)
    _check(model, layers)
    bare = unwrap(model)
    with unfolded(model):
        args, kwargs = example_arguments(bare, example_input)
        if example_input is None:
            args = (torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).to(args[0]),)
        pairs, parameters = _sound_pairs(bare, layers, args, kwargs)
        modules = {layer: _rest(layer, name not in pairs.convs) for name, layer in layers.items()}
        with evaluating(bare), _undone_on_error(bare):
            _replace(bare, parameters, modules)
            check_that_none_is_called(bare, layers, args, kwargs)
    _log.info(
        "absorbed %d of %d BN layers of %s; a scale and shift each remains of: %s",
        len(pairs.convs),
        len(layers),
        type(bare).__name__,
        ", ".join(pairs.obstacles) or "none",
    )
    return model


def scaled_layers(model: nn.Module) -> list[str]:
    """Names of the `ChannelScale` layers that `fuse_bn` has left in a model."""
    return [name for name, module in walk_modules(model) if isinstance(module, ChannelScale)]


def _check(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    refuse_quantised(model)
    for name, layer in layers.items():
        require_known(layer, name)
        switches = switches_of(layer)
        if switches.eval_stats != "running" or population_of(layer).stats is None:
            raise LayerError(
                f"BN layer {name!r} does not normalise with running statistics in evaluation "
                f"(eval_stats={switches.eval_stats!r}), so there is nothing fixed to fuse; set eval_stats='running'"
            )
    if "" in layers:
        raise LayerError(f"the model is itself a {type(layers['']).__name__}; fuse the model that holds it")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise PolicyError("fuse_bn makes new Parameters, which a DDP wrapper would not see; fuse model.module")


def _sound_pairs(
    model: nn.Module, layers: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Pairs, dict[nn.Module, dict[str, Parameter | None]]]:
    """The pairs that may be fused for good, and the parameters that their convs then have."""
    pairs = find_pairs(model, layers, kwargs or args, purpose="fuse")
    parameters = _absorbed_parameters(layers, pairs.convs)
    with evaluating(model):
        differing = differing_pairs(model, layers, pairs.convs, parameters, args, kwargs)
    for name in differing:
        pairs.obstacles[name] = "fused it would compute something else"
        for conv in pairs.convs.pop(name).values():
            del parameters[conv]
    return pairs, parameters


def _absorbed_parameters(
    layers: Mapping[str, nn.Module], convs: Mapping[str, Mapping[str, nn.Module]]
) -> dict[nn.Module, dict[str, Parameter | None]]:
    parameters: dict[nn.Module, dict[str, Parameter | None]] = {}
    for name, feeding in convs.items():
        trains = [tensor.requires_grad for tensor in population_of(layers[name]).affine if tensor is not None]
        for conv in feeding.values():
            with torch.no_grad():
                weight, bias = fold_parameters(conv, layers[name], widest_dtype(cast(Tensor, conv.weight)))
            learns = any([*trains, *(tensor.requires_grad for tensor in conv.parameters(recurse=False))])
            fused = {"weight": Parameter(weight, learns), "bias": Parameter(bias, learns)}
            parameters[conv] = {**conv._parameters, **fused}
    return parameters


def _rest(layer: nn.Module, scales: bool) -> nn.Module:
    """What takes the place of a BN layer: its tail, behind a scale and shift if no conv has absorbed it."""
    tail = require_known(layer).tail
    steps: list[nn.Module] = [_channel_scale(layer)] if scales else []
    if tail is _drop_and_act:
        steps += [child for child in layer.children() if not isinstance(child, nn.Identity)]
    elif tail is not _no_tail:
        steps.append(_Tail(layer))
    rest = steps[0] if len(steps) == 1 else nn.Sequential(*steps) if steps else nn.Identity()
    return rest.train(layer.training)


def _channel_scale(layer: nn.Module) -> ChannelScale:
    population = population_of(layer)
    stats, (gain, shift) = population.require_stats(), population.affine
    wide, dtype = widest_dtype(stats.mean), stats.mean.dtype
    with torch.no_grad():
        scale = (stats.var.to(wide) + population.eps).rsqrt()
        scale = scale if gain is None else scale * gain
        offset = -stats.mean * scale
        scaled = ChannelScale(scale.to(dtype), (offset if shift is None else offset + shift).to(dtype))
    return scaled.requires_grad_(any(tensor is not None and tensor.requires_grad for tensor in (gain, shift)))


def _replace(
    model: nn.Module,
    parameters: Mapping[nn.Module, dict[str, Parameter | None]],
    modules: Mapping[nn.Module, nn.Module],
) -> None:
    for conv, own in parameters.items():
        conv._parameters = own
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in modules:
                parent._modules[name] = modules[child]


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    before = [(module, dict(module._modules), module._parameters) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, children, parameters in before:
            module._modules.update(children)
            module._parameters = parameters
        raise
