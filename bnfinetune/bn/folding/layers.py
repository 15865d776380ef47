"""Convs and BN layers of frozen statistics that are computed as one where one hands itself to the other.

Both layers are changed in place. The conv gives the promise of its output instead of computing it; the BN layer, when
it gets such a promise untouched, runs the conv with folded parameters. In every other case each does what it did
unfolded, so that nothing rests on which layers were seen to feed which.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all_modules

from bnfinetune.bn.class_change import is_as_made, make_class, put_on, take_off
from bnfinetune.bn.folding.arithmetic import compute_as_one
from bnfinetune.bn.folding.deferred import can_defer, defer, settled, untouched
from bnfinetune.bn.folding.keeper import Keeper
from bnfinetune.bn.layers import BNClass, Tail, class_for_pickle, class_from_pickle, require_known
from bnfinetune.bn.policy.switched_layer import SwitchedBN, blank_layer, change_listeners, switches_of
from bnfinetune.errors import LayerError


class FoldedConv(nn.Module):
    """Mixed into a conv's class by `fold_pair`; never built by itself."""

    _native_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        compute = super().forward
        # Without gradient in training it may run within an autograd function, as of reentrant checkpointing, which
        # cannot give a promise away; whoever watches the conv, or offloads its weights after it ran, wants the output.
        if (self.training and not torch.is_grad_enabled()) or is_watched(self) or not can_defer(*args):
            return cast(Tensor, compute(*args, **kwargs))
        return defer(self, compute, args, kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, with its BN layer folded in"

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = super().__reduce_ex__(protocol)
        return (_blank_conv, (self._native_class,), state[2]) if is_as_made(self) else state


class FoldedBN(nn.Module):
    """Mixed into a BN layer's class by `fold_pair`: takes the conv before it in, or else normalises as ever."""

    _native_class: ClassVar[type[nn.Module]]
    _fold_tail: ClassVar[Tail]
    _fold_convs: tuple[nn.Module, ...]
    _fold_keeper: Keeper | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_watched(self) or self._forward_pre_hooks:
            args, kwargs = settled(args), settled(kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        promise = untouched(args[0]) if len(args) == 1 else None
        if promise is not None and _fits(promise._conv, self, promise._args[0]):
            y = compute_as_one(promise._conv, self, promise._args, promise._kwargs, self._fold_keeper)
            return type(self)._fold_tail(self, y)
        args, kwargs = settled(args), settled(kwargs)
        if args and isinstance(args[0], Tensor) and args[0].is_meta and not self.running_mean.is_meta:
            raise LayerError(
                f"a folded {self._native_class.__name__} got what something else has made of its conv's output before "
                "that was computed, by other means than PyTorch's operators; call unfold_bn(model)"
            )
        return cast(Tensor, super().forward(*args, **kwargs))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, folded"

    def __getstate__(self) -> Any:
        return {key: value for key, value in vars(self).items() if key != "_fold_keeper"}

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = super().__reduce_ex__(protocol)
        if not is_as_made(self):
            return state
        return _blank_bn, (*class_for_pickle(self), isinstance(self, SwitchedBN)), state[2]


def is_watched(layer: nn.Module) -> bool:
    """Whether somebody sees what a layer gives, or how it comes about: hooks, or a `forward` kept on the layer."""
    seen = layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks or "forward" in vars(layer)
    return bool(seen) or bool(
        hooks_of_all_modules._global_forward_hooks
        or hooks_of_all_modules._global_backward_hooks
        or hooks_of_all_modules._global_backward_pre_hooks
    )


def _fits(conv: Any, bn: Any, x: Tensor) -> bool:
    """Whether the channels that a BN layer normalises are the outputs of a conv of a batch x."""
    channels = conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels
    return x.ndim == conv.weight.ndim and len(bn.running_mean) == channels


@cache
def _folded_conv_class(native: Any) -> type:
    return make_class(f"Folded{native.__name__}", FoldedConv, native, _native_class=native)


@cache
def _folded_bn_class(cls: Any, tail: Tail) -> type:
    native = getattr(cls, "_native_class", cls)
    return make_class(f"Folded{cls.__name__}", FoldedBN, cls, _native_class=native, _fold_tail=staticmethod(tail))


def _blank_conv(native: Any) -> nn.Module:
    conv: nn.Module = native.__new__(native)
    put_on(conv, _folded_conv_class)
    return conv


def _blank_bn(native: Any, known: BNClass | None, switched: bool) -> nn.Module:
    layer = blank_layer(native, known) if switched else cast(nn.Module, native.__new__(native))
    _fold_layer(layer, class_from_pickle(native, known).tail)
    return layer


def _fold_layer(layer: nn.Module, tail: Tail) -> None:
    put_on(layer, lambda cls: _folded_bn_class(cls, tail))


def is_foldable(bn: nn.Module) -> bool:
    """Whether a BN layer normalises with running statistics in both modes and does not update them.

    Raises:
        LayerError: the layer's class has a `forward` of its own and is not registered.
    """
    switches = switches_of(bn)
    return switches._replace(affine="") == ("running", "none", "", "running")


def fold_pair(bn: Any, convs: tuple[Any, ...], keeper: Keeper | None = None) -> None:
    """Lets a BN layer take in the convs before it, in place; with a keeper, folded parameters are kept."""
    for conv in convs:
        if not isinstance(conv, FoldedConv):
            put_on(conv, _folded_conv_class)
    bn._fold_convs = convs
    _fold_layer(bn, require_known(bn).tail)
    keep_folded(bn, keeper)


def unfold_layer(bn: Any) -> tuple[nn.Module, ...]:
    """Undoes `fold_pair` and returns the convs; a layer that is not folded stays as it is."""
    vars(bn).pop("_fold_obstacle", None)
    if not isinstance(bn, FoldedBN):
        return ()
    convs = bn._fold_convs
    for conv in convs:
        unfold_conv(conv)
    take_off(bn, FoldedBN)
    del bn._fold_convs
    vars(bn).pop("_fold_keeper", None)
    return convs


def keep_folded(bn: nn.Module, keeper: Keeper | None) -> None:
    """Gives a folded layer a keeper of its folded parameters, or takes it away."""
    if keeper is None:
        vars(bn).pop("_fold_keeper", None)
    elif isinstance(bn, FoldedBN):
        vars(bn)["_fold_keeper"] = keeper


def unfold_conv(conv: nn.Module) -> None:
    """Lets a conv compute its output at once again."""
    if isinstance(conv, FoldedConv):
        take_off(conv, FoldedConv)


def _unfold_before_change(_: nn.Module, layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        unfold_layer(layer)


change_listeners.append(_unfold_before_change)
