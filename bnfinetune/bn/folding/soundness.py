"""Whether a model may be fused, pair by pair: what a detector or a random network returns as a whole says little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from bnfinetune.bn.folding.arithmetic import run_with
from bnfinetune.bn.layers import bn_tail, walk_modules
from bnfinetune.errors import LayerError

_QUANTISED = ("torch.ao.nn.", "torch.nn.intrinsic", "torch.nn.qat", "torch.nn.quantized", "torchao.")


def refuse_quantised(model: nn.Module) -> None:
    """Refuses models that are made for quantisation-aware training, whose layers hold BN layers of their own.

    Raises:
        LayerError: such a layer, by name.
    """
    for name, module in walk_modules(model):
        if type(module).__module__.startswith(_QUANTISED) and not isinstance(module, nn.Identity):
            raise LayerError(
                f"{name!r} is a {type(module).__module__}.{type(module).__name__}, made for quantisation-aware "
                "training, which fuses BN layers itself; fuse the model before it is prepared, or convert it first"
            )


def differing_pairs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    convs: Mapping[str, Mapping[str, nn.Module]],
    parameters: Mapping[nn.Module, Mapping[str, Parameter | None]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[str]:
    """Names of layers whose first output of a forward is not what the conv before it gives with fused parameters."""
    got: dict[int, tuple[nn.Module, Any, Any]] = {}
    errors: dict[str, float] = {}

    def left_conv(conv: nn.Module, conv_args: Any, conv_kwargs: Any, output: Any) -> None:
        got[id(output)] = conv, conv_args, conv_kwargs

    def left_bn(name: str, layer: nn.Module, bn_args: Any, bn_kwargs: Any, output: Tensor) -> None:
        x = next(iter((*bn_args, *bn_kwargs.values())))
        if name not in errors and id(x) in got:
            conv, conv_args, conv_kwargs = got[id(x)]
            weight, bias = cast(Tensor, parameters[conv]["weight"]), parameters[conv]["bias"]
            fused = bn_tail(layer)(run_with(conv, weight, bias, *conv_args, **conv_kwargs))
            errors[name] = _relative_error(fused, output)

    with ExitStack() as stack:
        for name in convs:
            for conv in convs[name].values():
                stack.callback(conv.register_forward_hook(left_conv, with_kwargs=True).remove)
            hook = partial(left_bn, name)
            stack.callback(layers[name].register_forward_hook(hook, with_kwargs=True).remove)
        model(*args, **kwargs)
    return [name for name, error in errors.items() if not error <= 1]


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest error in units of what roundoff explains; values that are not finite must be the same."""
    finite = wanted.isfinite()
    if not (found.isfinite() == finite).all():
        return math.inf
    if not finite.any():
        return 0.0
    error, scale = (found - wanted)[finite].abs().max(), wanted[finite].abs().max()
    return float(error / (torch.finfo(wanted.dtype).eps ** 0.5 * scale)) if error else 0.0


def check_that_none_is_called(
    model: nn.Module, layers: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Runs a model whose BN layers have been replaced, and refuses if one of them still takes part."""
    called: list[str] = []
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = partial(lambda name, *_: called.append(name), name)
            stack.callback(layer.register_forward_pre_hook(hook).remove)
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise LayerError(
                f"{type(model).__name__} fails without its BN layers ({type(error).__name__}: {error}), so fusing was "
                "undone; look for code that reads a BN layer's parameters or statistics by itself"
            ) from error
    if called:
        raise LayerError(
            f"BN layer {called[0]!r} of {type(model).__name__} is called by code that holds it outside of the "
            "module's children, so fusing was undone; let that code look the layer up where it is registered"
        )
