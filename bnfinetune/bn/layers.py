"""What a BatchNorm layer is, what it is called, and what it does after normalising.

A BN layer is recognised by behaviour: a module that owns `running_mean` and `running_var`. That covers
`nn.BatchNorm1d/2d/3d`, `nn.SyncBatchNorm`, timm's `BatchNormAct2d` and `SyncBatchNormAct`, the frozen layers of
torchvision and timm, and layers built with `track_running_stats=False`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.optim.swa_utils import AveragedModel

from bnfinetune.errors import LayerError, SelectionError

Tail = Callable[[nn.Module, Tensor], Tensor]
Globs = str | Sequence[str]

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
    """

    tail: Tail
    frozen: bool = False


def _no_tail(layer: nn.Module, x: Tensor) -> Tensor:
    return x


def _drop_and_act(layer: nn.Module, x: Tensor) -> Tensor:
    drop, act = layer._modules.get("drop"), layer._modules.get("act")
    x = x if drop is None else drop(x)
    return x if act is None else act(x)


# Keyed by full class name, so that neither timm nor torchvision need be imported to recognise their layers.
_KNOWN_CLASSES: dict[str, BNClass] = {
    "torch.nn.modules.batchnorm._BatchNorm": BNClass(_no_tail),
    "torch.nn.modules.batchnorm.SyncBatchNorm": BNClass(_no_tail),
    "torchvision.ops.misc.FrozenBatchNorm2d": BNClass(_no_tail, frozen=True),
    "timm.layers.norm_act.BatchNormAct2d": BNClass(_drop_and_act),
    "timm.layers.norm_act.SyncBatchNormAct": BNClass(_drop_and_act),
    "timm.layers.norm_act.FrozenBatchNormAct2d": BNClass(_drop_and_act, frozen=True),
}


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register_bn_class(cls: type[nn.Module], tail: Tail | None = None, *, frozen: bool = False) -> None:
    """Declares how a BN class with a `forward` of its own behaves, so that policies can take it over.

    A policy normalises by its own rules and then calls `tail`; what else the class's `forward` does would be lost,
    which is why an unregistered class is refused. Subclasses that keep this `forward` are covered too.

    Args:
        cls: a module class that owns `running_mean` and `running_var`, and has `eps`.
        tail: called as `tail(layer, normalised)` after the affine step, with and returning shape (N, C, ...);
            by default nothing follows.
        frozen: the class by itself always normalises with its running statistics and trains nothing.

    Example:
        >>> register_bn_class(BatchNormSwish, tail=lambda layer, x: x * x.sigmoid())

    Raises:
        LayerError: `cls` is not a module class.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise LayerError(f"register_bn_class got {cls!r}; pass the layer's class, a subclass of nn.Module")
    _KNOWN_CLASSES[_full_name(cls)] = BNClass(tail or _no_tail, frozen)


def native_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer without any policy: what `restore_bn` gives back."""
    return getattr(type(layer), "_native_class", type(layer))


def bn_class(layer: nn.Module) -> BNClass | None:
    """What is known of a layer's class; None where its `forward` is its own and unregistered."""
    for cls in native_class(layer).__mro__:
        known = _KNOWN_CLASSES.get(_full_name(cls))
        if known is not None:
            return known
        if "forward" in vars(cls):
            return None
    return None


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
        LayerError: the layer's class has a `forward` of its own and is not registered.
    """
    known = bn_class(layer)
    if known is None:
        cls = native_class(layer)
        raise LayerError(
            f"BN layer {name or '<unnamed>'!r} is a {_full_name(cls)}, whose own forward is unknown here; "
            f"call register_bn_class({cls.__name__}, tail=...) first, or exclude the layer"
        )
    return known


def is_bn_layer(module: nn.Module) -> bool:
    """Whether a module is a BN layer: it owns `running_mean` and `running_var`, and is no instance norm."""
    if isinstance(module, _InstanceNorm):
        return False
    return isinstance(module, _BatchNorm) or {"running_mean", "running_var"} <= module._buffers.keys()


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside DDP, DataParallel, `AveragedModel`, FSDP and `torch.compile` wrappers."""
    while (child := _wrapped_child(model)) is not None:
        model = child
    return model


def _wrapped_child(module: nn.Module) -> nn.Module | None:
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
        never hold a wrapper's `module.` or `_orig_mod.`; a model that is itself a BN layer has the name "".

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


def select_layers(model: nn.Module, layers: Globs = "*", exclude: Globs = ()) -> dict[str, nn.Module]:
    """Selects BN layers by globs on their whole qualified names.

    Args:
        model: any module, wrapped or not.
        layers: one glob or several (`fnmatch`: `*` crosses dots). A layer is taken if any glob fits any of its names.
        exclude: globs of layers to leave out.

    Returns:
        The selected layers by qualified name, in registration order.

    Raises:
        SelectionError: a glob matches no BN layer, or nothing is left after `exclude`.
        LayerError: a lazy BN layer has not seen data yet.
    """
    named = _layers_with_names(model)
    taken = _matching(named, layers)
    left_out = _matching(named, exclude)
    selected = {names[0]: layer for layer, names in named.items() if layer in taken and layer not in left_out}
    if not selected:
        raise SelectionError(f"layers={layers!r} with exclude={exclude!r} leaves no BN layer; exclude fewer of them")
    return selected


def _matching(named: dict[nn.Module, list[str]], globs: Globs) -> set[nn.Module]:
    matched: set[nn.Module] = set()
    for glob in as_globs(globs):
        hits = {layer for layer, names in named.items() if any(fnmatchcase(name, glob) for name in names)}
        if not hits:
            every_name = [name for names in named.values() for name in names]
            raise SelectionError(f"{glob!r} matches no BN layer; near names: {', '.join(_near(glob, every_name))}")
        matched |= hits
    return matched


def as_globs(globs: Globs) -> tuple[str, ...]:
    """One glob or several as a tuple."""
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _near(glob: str, names: Iterable[str]) -> list[str]:
    shown = [name or "'' (the model itself)" for name in names]
    return difflib.get_close_matches(glob, shown, n=3, cutoff=0.3) or shown[:3]
