"""Convs that also do what the frozen BN layers behind them did.

Both layers are taken over in place, as in switches.py: the conv's class becomes a subclass of its own that folds, with
parameters computed anew in each forward, and the BN layer's one that only applies what follows normalising.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from bnfinetune.bn.folding.arithmetic import (
    Normaliser,
    channel_axis,
    fold_parameters,
    fold_with,
    has_fewer_outputs,
    normalise_outputs,
    normaliser,
    parameters_of,
    run_with,
)
from bnfinetune.bn.layers import BNClass, Tail, class_for_pickle, class_from_pickle, eps_of, native_class, require_known
from bnfinetune.bn.policy.switched_layer import SwitchedBN, _blank_layer, change_listeners, switches_of
from bnfinetune.bn.population import population_of


class _Kept:
    """Tensors together with what they were computed from, to see whether that has changed since."""

    def __init__(self, sources: list[Tensor], setting: tuple[Any, ...], made: tuple[Tensor, ...]) -> None:
        self.sources = [(tensor, tensor._version, tensor.data_ptr()) for tensor in sources]
        self.setting = setting
        self.made = made

    def holds_for(self, sources: list[Tensor], setting: tuple[Any, ...]) -> bool:
        return (
            setting == self.setting
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
        kept: the folded parameters where neither layer trains, else what the statistics say; no copy of the conv
            takes them along.
    """

    bn: nn.Module
    kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"bn": self.bn, "kept": None}

    def convolve(self, conv: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the conv with folded parameters: the kept ones if neither layer trains and nothing has changed.

        Where the conv has fewer outputs than weights, as late in a network or with few images, the two layers run one
        after the other: that is less memory traffic, and what is kept, if g trains, are these few outputs.
        """
        bn = self.bn
        if _traced():
            return run_with(conv, *fold_parameters(conv, bn), *args, **kwargs)
        parameters = parameters_of(conv, bn)
        learned = [tensor for tensor in parameters if tensor is not None]
        if not any(tensor.requires_grad for tensor in learned):
            return run_with(conv, *self._keep(None, learned, lambda: fold_parameters(conv, bn)), *args, **kwargs)
        wide = parameters.wide
        fixed = Normaliser(*self._keep(wide, [], lambda: normaliser(bn, wide)))
        if has_fewer_outputs(conv, *args, *kwargs.values()):
            z = cast(Any, native_class(conv)).forward(conv, *args, **kwargs)
            return normalise_outputs(z, parameters, fixed, eps_of(bn))
        return run_with(conv, *fold_with(parameters, fixed, channel_axis(conv)), *args, **kwargs)

    def _keep(
        self, dtype: torch.dtype | None, learned: list[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `make` computes from the statistics and from what was learned, kept until one of these changes."""
        sources = [*learned, *(population_of(self.bn).stats or ())[:2]]
        if any(tensor.is_inference() for tensor in sources):
            return make()
        setting = (dtype, eps_of(self.bn))
        if self.kept is None or not self.kept.holds_for(sources, setting):
            # Inference tensors could not be used in a later forward that trains.
            with torch.inference_mode(False), torch.no_grad():
                self.kept = _Kept(sources, setting, make())
        return self.kept.made


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


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
        return self._fold.convolve(self, *args, **kwargs)

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
        return _blank_bn, (*class_for_pickle(self), isinstance(self, SwitchedBN)), state


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


def _blank_bn(native: Any, known: BNClass | None, switched: bool) -> nn.Module:
    layer = _blank_layer(native, known) if switched else native.__new__(native)
    _become(layer, _folded_bn_class, class_from_pickle(native, known))
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
