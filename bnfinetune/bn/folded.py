"""A convolution that also does what the frozen BN layer behind it did.

With fixed statistics, conv + BN is one conv with other weights:

    y = conv(x, W * s) + (b + (c - m) * s),    s = g / sqrt(v + e)

computed anew from W, c, g, b in each forward, so that gradients reach all of them while nothing of activation size is
added (You et al. 2024, "Tune Mode ConvBN Blocks"). Both layers are taken over in place, as in switches.py: the conv's
class becomes a subclass of its own that folds, the BN layer's one that only applies what follows normalising.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bnfinetune.bn.layers import BNClass, Tail, native_class, require_known
from bnfinetune.bn.recorder import affine_of, population_of
from bnfinetune.bn.switches import SwitchedBN, _blank_layer, change_listeners, switches_of
from bnfinetune.errors import LayerError

CONVOLUTIONS = (_ConvNd, nn.Linear)
"""What can take a BN layer in: on a batch (N, C), `nn.Linear` is a convolution of kernel size 1."""


class _FoldParameters(torch.autograd.Function):
    """`W * s` and `b + o * s` with `s = g r`: half as many small kernels as autograd would run."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, offset: Tensor, rstd: Tensor, gain: Tensor | None, shift: Tensor | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        scale = rstd if gain is None else gain * rstd
        bias = offset * scale if shift is None else torch.addcmul(shift, offset, scale)
        return weight * scale.view(shape), bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, offset, rstd, gain, _, ctx.shape = inputs
        ctx.save_for_backward(weight, offset, rstd, gain)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        weight, offset, rstd, gain = ctx.saved_tensors
        for_weight, for_offset, _, for_gain, for_shift, _ = ctx.needs_input_grad
        scale = rstd if gain is None else gain * rstd
        to_gain = None
        if for_gain:
            dims = [dim for dim, size in enumerate(ctx.shape) if size == 1]
            to_gain = rstd * torch.addcmul((grad_weight * weight).sum(dims), grad_bias, offset)
        return (
            grad_weight * scale.view(ctx.shape) if for_weight else None,
            grad_bias * scale if for_offset else None,
            None,
            to_gain,
            grad_bias if for_shift else None,
            None,
        )


def channel_axis(conv: nn.Module) -> int:
    """The axis of a conv's weight that runs over output channels."""
    return 1 if isinstance(conv, _ConvTransposeNd) else 0


def fold_parameters(conv: nn.Module, bn: nn.Module, wide: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias with which a conv alone computes what it and a BN layer of fixed statistics do.

    Args:
        conv: a convolution with `weight` (O, I, ...) or, where transposed, (I, O, ...).
        bn: a BN layer of O channels, normalising with the running statistics of its present domain.
        wide: the dtype to compute in; by default that of W, or float32 for half precision.

    Returns:
        `W * s` in the shape of W, and `b + (c - m) * s` of shape (O,), both in the dtype of W and differentiable in
        W, c, g and b.
    """
    stats = population_of(bn)
    if stats is None:
        raise LayerError(f"a folded {native_class(bn).__name__} has lost its running statistics; set them again")
    weight, own_bias = cast(Tensor, conv.weight), cast(Tensor | None, conv.bias)
    wide = wide or torch.promote_types(weight.dtype, torch.float32)
    gain, shift = (None if tensor is None else tensor.to(wide) for tensor in affine_of(bn))
    mean = stats.mean.to(wide)
    # Both are new tensors, since DDP overwrites buffers at the next forward, which may come before this backward.
    rstd = (stats.var.to(wide) + cast(float, bn.eps)).rsqrt()
    offset = -mean if own_bias is None else own_bias.to(wide) - mean
    axis = channel_axis(conv)
    shape = tuple(-1 if dim == axis else 1 for dim in range(weight.ndim))
    folded, bias = _FoldParameters.apply(weight.to(wide), offset, rstd, gain, shift, shape)
    return folded.to(weight.dtype), bias.to(weight.dtype)


def run_with(conv: nn.Module, weight: Tensor, bias: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Runs the forward of a conv's own class with another weight and bias, leaving the conv as it is."""
    native: Any = native_class(conv)
    stand_in = object.__new__(native)
    vars(stand_in).update(vars(conv))
    vars(stand_in)["_parameters"] = {**conv._parameters, "weight": weight, "bias": bias}
    return cast(Tensor, native.forward(stand_in, *args, **kwargs))


class _Kept:
    """Folded parameters together with what they were computed from, to see whether that has changed since."""

    def __init__(self, sources: list[Tensor], eps: float, folded: tuple[Tensor, Tensor]) -> None:
        self.sources = [(tensor, tensor._version, tensor.data_ptr()) for tensor in sources]
        self.eps = eps
        self.folded = folded

    def holds_for(self, sources: list[Tensor], eps: float) -> bool:
        return (
            eps == self.eps
            and len(sources) == len(self.sources)
            and all(
                now is then and now._version == version and now.data_ptr() == address
                for now, (then, version, address) in zip(sources, self.sources, strict=True)
            )
        )


@dataclass
class Fold:
    """What a conv that folds knows besides its own parameters.

    Attributes:
        bn: the BN layer that it has taken in, not registered as a submodule.
        kept: the folded parameters, where neither layer trains; no copy of the layer takes them along.
    """

    bn: nn.Module
    kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"bn": self.bn, "kept": None}

    def parameters(self, conv: nn.Module) -> tuple[Tensor, Tensor]:
        """Folded weight and bias: the kept ones if neither layer trains and nothing has changed."""
        if _traced():
            return fold_parameters(conv, self.bn)
        sources, eps = _sources(conv, self.bn), cast(float, self.bn.eps)
        if any(tensor.requires_grad or tensor.is_inference() for tensor in sources):
            self.kept = None
            return fold_parameters(conv, self.bn)
        if self.kept is None or not self.kept.holds_for(sources, eps):
            # Inference tensors could not be used in a later forward that trains.
            with torch.inference_mode(False), torch.no_grad():
                self.kept = _Kept(sources, eps, fold_parameters(conv, self.bn))
        return self.kept.folded


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _sources(conv: nn.Module, bn: nn.Module) -> list[Tensor]:
    stats = population_of(bn)
    candidates = [conv.weight, conv.bias, *affine_of(bn), *(() if stats is None else stats[:2])]
    return [tensor for tensor in candidates if isinstance(tensor, Tensor)]


class _ForgetsFolds(nn.Module):
    """Drops kept parameters wherever values may change without leaving a trace in a tensor's version."""

    def _folds(self) -> list[Fold]:
        raise NotImplementedError

    def _forget(self) -> None:
        for fold in self._folds():
            fold.kept = None

    def train(self, mode: bool = True) -> Any:
        self._forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)


class FoldedConv(_ForgetsFolds):
    """Mixed into a conv's class by `fold_pair`; never built by itself."""

    _native_class: ClassVar[type[nn.Module]]
    _fold: Fold

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return run_with(self, *self._fold.parameters(self), *args, **kwargs)

    def _folds(self) -> list[Fold]:
        return [self._fold]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, with its BN layer folded in"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank_conv, (self._native_class,), cast(Any, super().__reduce_ex__(protocol))[2]


class FoldedBN(_ForgetsFolds):
    """Mixed into a BN layer's class by `fold_pair`: the conv has normalised, what is left is the layer's tail."""

    _native_class: ClassVar[type[nn.Module]]
    _bn_tail: ClassVar[Tail]
    _fold_convs: tuple[FoldedConv, ...]

    def forward(self, x: Tensor) -> Tensor:
        return type(self)._bn_tail(self, x)

    def _folds(self) -> list[Fold]:
        return [conv._fold for conv in self._fold_convs]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, folded"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = cast(Any, super().__reduce_ex__(protocol))[2]
        return _blank_bn, (self._native_class, isinstance(self, SwitchedBN)), state


@cache
def _folded_conv_class(native: Any) -> type[FoldedConv]:
    members = {"__module__": native.__module__, "_native_class": native}  # torch.fx takes those of torch.nn for leaves
    return cast(type[FoldedConv], type(f"Folded{native.__name__}", (FoldedConv, native), members))


@cache
def _folded_bn_class(cls: Any, known: BNClass) -> type[FoldedBN]:
    native = getattr(cls, "_native_class", cls)
    members = {"__module__": cls.__module__, "_native_class": native, "_bn_tail": staticmethod(known.tail)}
    return cast(type[FoldedBN], type(f"Folded{cls.__name__}", (FoldedBN, cls), members))


def _become(layer: Any, folded_class: Callable[..., type], *known: BNClass) -> None:
    present: Any = type(layer)
    layer.__class__ = folded_class(present, *known)


def _blank_conv(native: Any) -> nn.Module:
    conv: nn.Module = native.__new__(native)
    conv.__class__ = _folded_conv_class(native)
    return conv


def _blank_bn(native: Any, switched: bool) -> nn.Module:
    layer = _blank_layer(native) if switched else native.__new__(native)
    _become(layer, _folded_bn_class, require_known(layer))
    return cast(nn.Module, layer)


def is_foldable(bn: nn.Module) -> bool:
    """Whether a BN layer normalises with running statistics in both modes and does not update them.

    Raises:
        LayerError: the layer's class has a `forward` of its own and is not registered.
    """
    switches = switches_of(bn)
    return switches._replace(affine="") == ("running", "none", "", "running")


def fold_pair(bn: Any, convs: tuple[Any, ...]) -> None:
    """Lets convs take a BN layer in, in place; every input of the layer must come from one of them."""
    for conv in convs:
        conv._fold = Fold(bn)
        _become(conv, _folded_conv_class)
    bn._fold_convs = convs
    _become(bn, _folded_bn_class, require_known(bn))


def unfold_layer(bn: Any) -> tuple[nn.Module, ...]:
    """Undoes `fold_pair` and returns the convs; a layer that is not folded stays as it is."""
    vars(bn).pop("_fold_obstacle", None)
    if not isinstance(bn, FoldedBN):
        return ()
    convs = bn._fold_convs
    for layer in (*convs, bn):
        layer.__class__ = type(layer).__bases__[-1]
    for conv in convs:
        del conv._fold
    del bn._fold_convs
    return convs


def _unfold_before_change(_: nn.Module, layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        unfold_layer(layer)


change_listeners.append(_unfold_before_change)
