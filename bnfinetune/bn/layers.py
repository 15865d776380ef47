"""What a BatchNorm layer is, what it is called, and what it does after normalising.

A BN layer is recognised by behaviour: a module that owns `running_mean` and `running_var`. That covers
`nn.BatchNorm1d/2d/3d`, `nn.SyncBatchNorm`, timm's `BatchNormAct2d` and `SyncBatchNormAct`, the frozen layers of
torchvision and timm, and layers built with `track_running_stats=False`.
"""

from __future__ import annotations

import difflib
import pickle
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.optim.swa_utils import AveragedModel

from bnfinetune.bn.class_probe import LEAST_EPS, computes, eps_by_trial
from bnfinetune.errors import LayerError, PolicyError, SelectionError

Tail = Callable[[nn.Module, Tensor], Tensor]
Predicate = Callable[[str, nn.Module], bool]
Selector = str | type[nn.Module] | Predicate
Selection = Selector | Sequence[Selector]
"""Which BN layers: a glob on qualified names, a class, a function of name and layer, or several of these."""

LAST = ":last"
"""Selects the last BN layer, in registration order."""

_WRAPPED_CHILD: dict[str, type[nn.Module] | tuple[type[nn.Module], ...]] = {
    "_orig_mod": nn.Module,  # torch.compile
    "_fsdp_wrapped_module": nn.Module,
    "_checkpoint_wrapped_module": nn.Module,
    "module": (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel),
}


class BNClass(NamedTuple):
    """What is known of a class of BN layers.

    Attributes:
        tail: what the layer applies after normalising, called as `tail(layer, normalised)`.
        frozen: whether the class by itself always normalises with its running statistics and trains nothing.
        eps: of layers that have no attribute `eps`; None if that is still to be found.
        tried: whether this was found by trying what one layer computes, and is known of that layer's like alone.
    """

    tail: Tail
    frozen: bool = False
    eps: float | None = None
    tried: bool = False


def _no_tail(layer: nn.Module, x: Tensor) -> Tensor:
    return x


def _drop_and_act(layer: nn.Module, x: Tensor) -> Tensor:
    drop, act = layer._modules.get("drop"), layer._modules.get("act")
    x = x if drop is None else drop(x)
    return x if act is None else act(x)


# By full name, so that neither timm nor torchvision need be imported to recognise their layers.
_KNOWN_CLASSES: dict[str, BNClass] = {
    "torch.nn.modules.batchnorm._BatchNorm": BNClass(_no_tail),
    "torch.nn.modules.batchnorm.SyncBatchNorm": BNClass(_no_tail),
    "torchvision.ops.misc.FrozenBatchNorm2d": BNClass(_no_tail, frozen=True),
    "timm.layers.norm_act.BatchNormAct2d": BNClass(_drop_and_act),
    "timm.layers.norm_act.SyncBatchNormAct": BNClass(_drop_and_act),
    "timm.layers.norm_act.FrozenBatchNormAct2d": BNClass(_drop_and_act, frozen=True),
}
_registered: WeakKeyDictionary[type, BNClass] = WeakKeyDictionary()
_tried: WeakKeyDictionary[type, dict[Any, BNClass | None]] = WeakKeyDictionary()
_tried_eps: WeakKeyDictionary[type, dict[Any, float | None]] = WeakKeyDictionary()
_TENSORS = {"running_mean", "running_var", "num_batches_tracked", "weight", "bias"}


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register_bn_class(
    cls: type[nn.Module], tail: Tail | None = None, *, frozen: bool = False, eps: float | None = None
) -> None:
    """Declares how a BN class with a `forward` of its own behaves, so that policies can take it over.

    A policy normalises by its own rules and then calls `tail`; what else the class's `forward` does would be lost,
    which is why an unregistered class is refused. Subclasses that keep this `forward` are covered too, and so is the
    class that takes this one's place when its module is loaded again, if it still computes the same. Frozen classes
    that hold nothing but buffers and compute nothing but BN need no registration.

    Args:
        cls: a module class that owns `running_mean` and `running_var`.
        tail: called as `tail(layer, normalised)` after the affine step, with and returning shape (N, C, ...);
            by default nothing follows. A function of a module travels with pickled layers into other processes.
        frozen: the class by itself always normalises with its running statistics and trains nothing.
        eps: added to the variance, for layers without an attribute `eps`; by default it is found by trying their
            `forward`.

    Examples:
        >>> register_bn_class(BatchNormSwish, tail=lambda layer, x: x * x.sigmoid())

    Raises:
        LayerError: `cls` is not a module class, or `eps` is negative.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise LayerError(f"register_bn_class got {cls!r}; pass the layer's class, a subclass of nn.Module")
    if eps is not None and not eps >= 0:
        raise LayerError(
            f"register_bn_class({cls.__name__}) got eps={eps}; give what is added to the variance, 0 or more"
        )
    _registered[cls] = BNClass(tail or _no_tail, frozen, eps)
    _tried.clear()
    _tried_eps.clear()


def native_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer without any policy: what `restore_bn` gives back."""
    return getattr(type(layer), "_native_class", type(layer))


def bn_class(layer: nn.Module) -> BNClass | None:
    """What is known of a layer's class; None where its `forward` is its own, unregistered and unlike any frozen BN."""
    known: BNClass | None = getattr(type(layer), "_bn_known", None)  # while a policy has it
    return known or _known_by_class(native_class(layer)) or _known_by_trial(layer)


def _known_by_class(native: type) -> BNClass | None:
    for cls in native.__mro__:
        known = _registered.get(cls) or _KNOWN_CLASSES.get(_full_name(cls))
        if known is not None or "forward" in vars(cls):
            return known
    return None


def _known_by_trial(layer: nn.Module) -> BNClass | None:
    """What a layer of an unknown class turns out to be, remembered for layers of the class with equal attributes."""
    if is_scripted(layer) or layer._buffers.get("running_mean") is None:
        return None
    native, attributes = native_class(layer), _attributes(layer)
    tried = _tried.setdefault(native, {})
    if attributes not in tried:
        tried[attributes] = _loaded_again(native, layer) or _look_alike(native, layer)
    return tried[attributes]


def _loaded_again(native: type, layer: nn.Module) -> BNClass | None:
    """What was registered of a class of the same name, if the layer still computes that; then it is registered too."""
    home = next(cls for cls in native.__mro__ if "forward" in vars(cls))
    if "<locals>" in home.__qualname__:  # each call of a function makes other classes of one name
        return None
    for cls, known in reversed(list(_registered.items())):
        if _full_name(cls) == _full_name(home):
            eps = _own_eps(layer, known)
            eps = eps_by_trial(native, layer) if eps is None else eps
            if eps is not None and computes(native, layer, known.tail, eps, frozen=known.frozen):
                _registered[home] = known
                return known
    return None


def _look_alike(native: type, layer: nn.Module) -> BNClass | None:
    """A frozen BN layer such as those of detectron2 and DETR, which holds statistics and affine as buffers alone."""
    holds = {key for key, buffer in layer._buffers.items() if buffer is not None}
    others = [*layer._modules.values(), *layer._parameters.values()]
    if not holds <= _TENSORS or any(other is not None for other in others):
        return None
    own = _own_eps(layer)
    eps = eps_by_trial(native, layer) if own is None else own
    if eps is None or not computes(native, layer, _no_tail, eps, frozen=True):
        return None
    return BNClass(_no_tail, frozen=True, eps=None if own is not None else eps, tried=True)


def _attributes(layer: nn.Module) -> frozenset[Any]:
    """What tells a layer apart from others of its class, besides the values of its tensors."""
    held = [
        key for store in (layer._buffers, layer._parameters, layer._modules) for key in store if store[key] is not None
    ]
    plain = [(key, value) for key, value in vars(layer).items() if key != "training" and _is_plain(value)]
    return frozenset([*held, *plain])


def _is_plain(value: object) -> bool:
    is_function = callable(value) and not isinstance(value, nn.Module | MethodType) and isinstance(value, Hashable)
    return value is None or isinstance(value, bool | int | float | str) or is_function


def _own_eps(layer: nn.Module, known: BNClass | None = None) -> float | None:
    eps = getattr(layer, "eps", None if known is None else known.eps)
    return None if eps is None else float(eps)


def eps_of(layer: nn.Module, name: str = "") -> float:
    """What a BN layer adds to the variance, as an attribute, as registered, or as its `forward` turns out to do.

    Args:
        layer: a BN layer, under a policy or not.
        name: its qualified name, for messages.

    Raises:
        LayerError: the layer's class is unknown, or has no eps that could be found.
    """
    eps: float | Tensor | None = getattr(layer, "eps", None)
    if eps is not None:
        return eps if isinstance(eps, float) else float(eps)
    known = require_known(layer, name)
    eps = known.eps if known.eps is not None else _eps_by_trial(layer, known)
    if eps is None:
        cls = native_class(layer)
        raise LayerError(
            f"BN layer {name or '<unnamed>'!r} is a {_full_name(cls)} without an eps, and none fits what its forward "
            f"computes; call register_bn_class({cls.__name__}, ..., eps=...), or exclude the layer"
        )
    return eps


def computable_eps(layer: nn.Module, name: str = "") -> float:
    """`eps_of`, or 1e-30 where a layer adds nothing, which changes no variance: PyTorch refuses 0 in training.

    torchvision sets the eps of its detectors to 0 when it loads their own weights.

    Args:
        layer: a BN layer, under a policy or not.
        name: its qualified name, for messages.

    Raises:
        LayerError: as `eps_of`.
    """
    return eps_of(layer, name) or LEAST_EPS


def _eps_by_trial(layer: nn.Module, known: BNClass) -> float | None:
    native, attributes = native_class(layer), _attributes(layer)
    tried = _tried_eps.setdefault(native, {})
    if attributes not in tried:
        eps = eps_by_trial(native, layer)
        right = eps is not None and computes(native, layer, known.tail, eps, frozen=known.frozen)
        tried[attributes] = eps if right else None
    return tried[attributes]


def bn_tail(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a BN layer applies after normalising.

    Args:
        layer: a BN layer, under a policy or not.

    Returns:
        A function of a tensor (N, C, ...): the identity for plain BN, dropout and activation for timm's fused layers.

    Raises:
        LayerError: the layer's class has a `forward` of its own and is not registered.
    """
    known = require_known(layer)
    return lambda x: known.tail(layer, x)


def require_known(layer: nn.Module, name: str = "") -> BNClass:
    """The `BNClass` of a layer.

    Raises:
        LayerError: the layer's class has a `forward` of its own and is not registered, or the layer is scripted.
    """
    known = bn_class(layer)
    if known is not None:
        return known
    shown = repr(name or "<unnamed>")
    if is_scripted(layer):
        raise LayerError(
            f"BN layer {shown} is scripted or traced by torch.jit, which fixes what it computes; change the model it "
            "was made from and script that, or exclude the layer"
        )
    cls = native_class(layer)
    again = any(_full_name(cls) == _full_name(other) for other in _registered)
    reason = "is not the class of this name that was registered" if again else "whose own forward is unknown here"
    raise LayerError(
        f"BN layer {shown} is a {_full_name(cls)}, {reason}; "
        f"call register_bn_class({cls.__name__}, tail=...) first, or exclude the layer"
    )


def class_for_pickle(layer: nn.Module) -> tuple[type[nn.Module], BNClass | None]:
    """A layer's native class and what is known of it, for `class_from_pickle` in a process that may not know it.

    The second is None where it cannot be pickled.
    """
    known = bn_class(layer)
    try:
        pickle.dumps(known)
    except Exception:  # pickling may fail in any way
        known = None
    return native_class(layer), known


def class_from_pickle(native: type[nn.Module], known: BNClass | None) -> BNClass:
    """What is known of a class here, or was known where one of its layers was pickled; then it is registered here.

    Raises:
        LayerError: neither is.
    """
    here = _known_by_class(native)
    if here is not None:
        return here
    if known is None:
        raise LayerError(
            f"a pickled BN layer is a {_full_name(native)}, whose tail could not be pickled and is not registered in "
            f"this process; call register_bn_class({native.__name__}, tail=...) before loading, or make the tail a "
            "function of a module"
        )
    if not known.tried:
        _registered[native] = known
    return known


def is_bn_layer(module: nn.Module) -> bool:
    """Whether a module is a BN layer: it owns `running_mean` and `running_var`, and is no instance norm."""
    if isinstance(module, _InstanceNorm):
        return False
    return isinstance(module, _BatchNorm) or {"running_mean", "running_var"} <= set(module._buffers.keys())


def is_scripted(module: nn.Module) -> bool:
    """Whether `torch.jit` has scripted or traced a module, so that nothing can change what it computes."""
    return isinstance(module, torch.jit.ScriptModule)


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside DDP, DataParallel, `AveragedModel`, FSDP and `torch.compile` wrappers."""
    while (child := _wrapped_child(model)) is not None:
        model = child
    return model


def _wrapped_child(module: nn.Module) -> nn.Module | None:
    if is_scripted(module):
        return None
    for name, wrappers in _WRAPPED_CHILD.items():
        child = module._modules.get(name)
        if child is not None and isinstance(module, wrappers):
            return child
    return None


def walk_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its clean name; a shared module comes once under each of its names."""
    module = unwrap(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from walk_modules(child, f"{prefix}.{name}" if prefix else name)


def find_bn_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Finds every BN layer of a model.

    Args:
        model: any module, wrapped (DDP, `torch.compile`) or not, under a policy or not.

    Returns:
        The layers by qualified name in registration order, each shared layer once, under its first name. Names
        never hold a wrapper's `module.` or `_orig_mod.`; a model that is itself a BN layer has the name "". Layers that
        `torch.jit` has scripted or traced are among them, though nothing can change them.

    Raises:
        SelectionError: the model has no BN layer.
        LayerError: a lazy BN layer has not seen data yet.
    """
    return {names[0]: layer for layer, names in _layers_with_names(model).items()}


def _layers_with_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    found: dict[nn.Module, list[str]] = {}
    for name, module in walk_modules(model):
        if is_bn_layer(module):
            if isinstance(module, LazyModuleMixin):
                raise LayerError(
                    f"BN layer {name!r} is a {type(module).__name__} without a size yet; run one forward first"
                )
            found.setdefault(module, []).append(name)
    if not found:
        raise SelectionError(
            f"no BatchNorm layer in {type(unwrap(model)).__name__}, which normalises by {_other_norms(model)}; "
            "choose a model with BN, such as resnet50, or set no BN switch"
        )
    return found


def _other_norms(model: nn.Module) -> str:
    """The other normalisation layers of a model by class, such as `LayerNorm (25)`."""
    kinds = Counter(type(module).__name__ for module in model.modules() if "norm" in type(module).__name__.lower())
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(3)) or "no layer of a known kind"


def select_layers(model: nn.Module, layers: Selection = "*", exclude: Selection = ()) -> dict[str, nn.Module]:
    """Selects BN layers by name, by class or by a function.

    Args:
        model: any module, wrapped or not.
        layers: one selector or several; a layer is taken if any of them fits it. A string is a glob on whole qualified
            names (`fnmatch`: `*` crosses dots), and fits if it fits any of the layer's names; `:last` is the last BN
            layer in registration order. A class, such as `nn.BatchNorm1d`, fits its instances and those of its
            subclasses, as they are without a policy. A function is called as `function(name, layer)`.
        exclude: selectors of layers to leave out.

    Returns:
        The selected layers by qualified name, in registration order.

    Raises:
        SelectionError: a selector fits no BN layer, or nothing is left after `exclude`.
        LayerError: a lazy BN layer has not seen data yet, or a selected layer is scripted.
    """
    named = _layers_with_names(model)
    taken = _matching(named, layers)
    left_out = _matching(named, exclude)
    selected = {names[0]: layer for layer, names in named.items() if layer in taken and layer not in left_out}
    if not selected:
        raise SelectionError(f"layers={layers!r} with exclude={exclude!r} leaves no BN layer; exclude fewer of them")
    for name, layer in selected.items():
        if is_scripted(layer):
            require_known(layer, name)
    return selected


def _matching(named: dict[nn.Module, list[str]], selection: Selection) -> set[nn.Module]:
    matched: set[nn.Module] = set()
    for selector in as_tuple(selection):
        fits = _test_of(selector, last=list(named)[-1])
        hits = {layer for layer, names in named.items() if any(fits(name, layer) for name in names)}
        if not hits:
            raise SelectionError(f"{_shown(selector)} matches no BN layer; {_present(selector, named)}")
        matched |= hits
    return matched


def _test_of(selector: Selector, last: nn.Module) -> Predicate:
    if selector == LAST:
        return lambda name, layer: layer is last
    if isinstance(selector, str):
        return lambda name, layer: fnmatchcase(name, selector)
    if isinstance(selector, type):
        return lambda name, layer: issubclass(native_class(layer), selector)
    if callable(selector):
        return selector
    raise SelectionError(
        f"{selector!r} selects no layers; give a glob, a class, a function of name and layer, or several"
    )


def as_tuple(one_or_several: Any) -> tuple[Any, ...]:
    """One string, class or function, or several of these, as a tuple."""
    single = isinstance(one_or_several, str) or not isinstance(one_or_several, Iterable)
    return (one_or_several,) if single else tuple(one_or_several)


def _shown(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else getattr(selector, "__qualname__", repr(selector))


def _present(selector: Selector, named: dict[nn.Module, list[str]]) -> str:
    """What the layers are, in the terms of a selector that fits none of them."""
    if isinstance(selector, type):
        kinds = Counter(native_class(layer).__name__ for layer in named)
        return "classes are " + ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(3))
    every_name = [name or "'' (the model itself)" for names in named.values() for name in names]
    near = difflib.get_close_matches(selector, every_name, n=3, cutoff=0.3) if isinstance(selector, str) else []
    return f"near names: {', '.join(near or every_name[:3])}"


def require_bare(model: nn.Module, verb: str) -> None:
    """Refuses to change modules of a model that is wrapped, or that holds a DDP wrapper anywhere.

    Raises:
        PolicyError: it is or does.
    """
    ddp = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    wrapper = model if unwrap(model) is not model else next(iter(ddp), None)
    if wrapper is not None:
        raise PolicyError(f"{verb} got a {type(wrapper).__name__}; convert the bare model, then wrap it again")


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts modules in the place of others wherever these stand in a model; gives the model, or what replaces it."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in new:
                module._modules[name] = new[child]
    return new.get(model, model)
