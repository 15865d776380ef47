"""A convolution's output that is not computed before somebody reads it: how a conv hands itself to the BN layer behind.

A folding conv gives no tensor but the promise of one. A BN layer that gets the untouched promise computes both layers
as one. Whoever else touches it, be it an operator, an attribute or a printout, finds what the conv alone computes: the
promise turns into that very tensor, in place, for all who hold it. So folding never rests on who was seen to read what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bnfinetune.errors import LayerError

Compute = Callable[..., Tensor]


class _Setting(NamedTuple):
    """What a forward depends on besides its inputs and parameters."""

    grad: bool
    device: str
    autocast: torch.dtype | None

    @classmethod
    def present(cls, device: str) -> _Setting:
        casts = _has_autocast(device) and torch.is_autocast_enabled(device)
        return cls(torch.is_grad_enabled(), device, torch.get_autocast_dtype(device) if casts else None)

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.grad):
            if _has_autocast(self.device):
                with torch.autocast(self.device, self.autocast, self.autocast is not None):
                    yield
            else:
                yield


_has_autocast = cache(torch.amp.is_autocast_available)


class _NeverRead(torch.autograd.Function):
    """Stands at the root of the graph of whatever reads a promise behind Python's back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise LayerError(
            "something has read the output of a conv that folds its BN layer by other means than PyTorch's operators, "
            "such as an autograd function applied to it directly; call unfold_bn(model) before training it that way"
        )


with torch.inference_mode(False), torch.enable_grad():
    # Of no dimension, so that a gradient of any shape may come as far as the function that refuses it.
    _NOTHING: Tensor = _NeverRead.apply(torch.empty((), device="meta", requires_grad=True))


class Deferred(Tensor):
    """The output of a conv that nobody has asked for yet; made by `defer`."""

    _conv: nn.Module
    _compute: Compute
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]
    _setting: _Setting
    _versions: list[tuple[Tensor, int]]
    _output: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = _WITHOUT_OUTPUT.get(func)
        if answer is not None and isinstance(args[0], Deferred):
            result = answer(func, *args, **kwargs)
            if result is not None:
                return result
        return func(*settled(args), **settled(kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return settled(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return settled(self).__deepcopy__(memo)


def defer(conv: nn.Module, compute: Compute, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The promise of `compute(*args, **kwargs)`, a conv's own output.

    Args:
        conv: the conv, for those who take it in.
        compute: the forward of the conv alone.
        args: its arguments, the first a tensor (N, I, ...).
        kwargs: its named arguments.
    """
    promise = _NOTHING.as_subclass(Deferred)
    read = [leaf for leaf in (*args, *kwargs.values(), conv.weight, conv.bias) if isinstance(leaf, Tensor)]
    vars(promise).update(
        _conv=conv,
        _compute=compute,
        _args=args,
        _kwargs=kwargs,
        _setting=_Setting.present(read[0].device.type),
        _versions=[(tensor, tensor._version) for tensor in read],
    )
    return promise


def can_defer(*args: Any) -> bool:
    """Whether a conv's forward of some arguments may be put off: nothing traces it, and changes would be seen."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or any(isinstance(x, Tensor) and x.is_inference() for x in args)
        or torch.is_inference_mode_enabled()
        or not (args and isinstance(args[0], Tensor))
    )


def untouched(x: Any) -> Deferred | None:
    """A promise that a BN layer may take in: nobody has read it, and it would still be kept as it was given."""
    if type(x) is not Deferred or "_output" in vars(x):
        return None
    return x if x._setting == _Setting.present(x._setting.device) and _is_unchanged(x) else None


def settled(tree: Any) -> Any:
    """Any nest of tensors with its promises kept: each has become the tensor that the conv alone computes.

    Raises:
        LayerError: what the conv read has been changed in place since.
    """
    for leaf in tree_leaves(tree):
        if type(leaf) is Deferred:
            _settle(leaf)
    return tree_map(lambda leaf: leaf._output if type(leaf) is Deferred else leaf, tree)


def _settle(promise: Deferred) -> None:
    if "_output" in vars(promise):
        return
    if not _is_unchanged(promise):
        raise LayerError(
            f"the output of {promise._conv} is read after its input or weight has changed in place, and it was not "
            "computed before since it folds its BN layer; call unfold_bn(model), or read the output at once"
        )
    with promise._setting.restored():
        output = promise._compute(*promise._args, **promise._kwargs)
    try:
        torch.utils.swap_tensors(promise, output)
    except RuntimeError:  # weak references to it: those who hold the promise go on with it, and it knows its output
        vars(promise)["_output"] = output


def _is_unchanged(promise: Deferred) -> bool:
    return all(tensor._version == version for tensor, version in promise._versions)


def _size(promise: Deferred) -> torch.Size | None:
    """The size of a promised output of `nn.Linear`; None for other convs."""
    conv: Any = promise._conv
    if isinstance(conv, nn.Linear) and not promise._kwargs:
        return torch.Size((*promise._args[0].shape[:-1], conv.out_features))
    return None


def _tell_size(func: Any, promise: Deferred, *args: Any, **kwargs: Any) -> Any:
    size = _size(promise)
    return None if size is None else func(torch.empty(size, device="meta"), *args, **kwargs)


def _reshape(func: Any, promise: Deferred, *args: Any, **kwargs: Any) -> Tensor | None:
    """A promise of the same rows of `nn.Linear`, laid out otherwise, as for tokens; None if it is no such thing."""
    size = _size(promise)
    if size is None:
        return None
    shape = func(torch.empty(size, device="meta"), *args, **kwargs).shape
    if not shape or shape[-1] != size[-1]:
        return None
    x = promise._args[0]
    return defer(promise._conv, promise._compute, (x.reshape(*shape[:-1], x.shape[-1]),), {})


_WITHOUT_OUTPUT: dict[Any, Callable[..., Any]] = {
    cast(Any, Tensor.shape).__get__: _tell_size,
    cast(Any, Tensor.ndim).__get__: _tell_size,
    Tensor.size: _tell_size,
    Tensor.dim: _tell_size,
    Tensor.flatten: _reshape,
    Tensor.reshape: _reshape,
    Tensor.view: _reshape,
    torch.flatten: _reshape,
    torch.reshape: _reshape,
}
