"""The class of a live module changed in place, together with what others did to that class before or do after.

Policies and folding give a module another class: a subclass, made here, of the class it was built with. Others do the
same: `register_parametrization` and FSDP2's `fully_shard` put a class of their own on top, made on the spot. Ours goes
below those, so that each can be taken away without the other; and a `forward` that is kept on the module itself, as by
accelerate's hooks, is bound anew to whatever the class computes now.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn

Mixin = type[nn.Module]

_MIXIN, _OVER, _SOURCE = "_bn_mixin", "_bn_over", "_bn_source"
_KEPT_FORWARDS = ("forward", "_old_forward")  # the second is accelerate's


def make_class(name: str, mixin: Mixin, over: type, *, base: type | None = None, **members: Any) -> type:
    """A subclass of a module's class with a mixin of ours in front; `put_on` makes it a module's class.

    Args:
        name: the new class's name.
        mixin: what comes first among its bases.
        over: the class that `take_off` gives back.
        base: the base after the mixin, where that is not `over` itself.
        members: class attributes.
    """
    module = over.__module__  # torch.fx takes modules of torch.nn for leaves
    return type(name, (mixin, base or over), {"__module__": module, _MIXIN: mixin, _OVER: over, **members})


def put_on(module: nn.Module, make: Callable[[type], type]) -> None:
    """Gives a module the class that `make` makes of its own, below classes that others have put on top."""
    present = type(module)
    home = present
    while _is_overlay(home):
        home = next(base for base in reversed(home.__bases__) if issubclass(base, nn.Module))
    _change(module, _with_base(present, home, make(home)))


def take_off(module: nn.Module, mixin: Mixin) -> None:
    """Takes what was made with a mixin out of a module's class; classes of others on top stay."""
    made = next(cls for cls in type(module).__mro__ if vars(cls).get(_MIXIN) is mixin)
    _change(module, _with_base(type(module), made, vars(made)[_OVER]))


def is_as_made(module: nn.Module) -> bool:
    """Whether a module's class is one of ours as it was made, with nothing of others on top."""
    return _MIXIN in vars(type(module))


def input_name(cls: type[nn.Module]) -> str:
    """The name under which a class takes its input: `input` in torch, `x` in timm."""
    return list(inspect.signature(cls.forward).parameters)[1]


def input_of_call(name: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The one input of a call by position or by name, as the class that was changed would take it.

    Args:
        name: the input's name; None takes any.
        args: what the call gave by position.
        kwargs: what it gave by name.

    Raises:
        TypeError: it got another argument, none, or several.
    """
    for key in kwargs:
        if name not in (None, key):
            raise TypeError(f"forward() got an unexpected keyword argument {key!r}; the input is named {name!r}")
    if len(args) + len(kwargs) != 1:
        raise TypeError(f"forward() takes one input, {name or 'a batch'!r}, but {len(args) + len(kwargs)} were given")
    return args[0] if args else next(iter(kwargs.values()))


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether a module keeps a `forward` of its own that hides whatever its class computes."""
    kept: Any = vars(module).get("forward")
    if kept is None or _is_own_forward(module, kept):
        return False
    # accelerate's hooks call what they found, which can be bound anew
    return not ("_hf_hook" in vars(module) and _is_own_forward(module, vars(module).get("_old_forward")))


def _is_own_forward(module: nn.Module, kept: Any) -> bool:
    own: Any = type(module).forward
    return isinstance(kept, MethodType) and kept.__self__ is module and kept.__func__ is own


def _change(module: nn.Module, cls: Any) -> None:
    own = [key for key in _KEPT_FORWARDS if _is_own_forward(module, vars(module).get(key))]
    module.__class__ = cls
    for key in own:
        vars(module)[key] = MethodType(cls.forward, module)


def _with_base(cls: type, old: type, new: type) -> type:
    """A class as it is, but for one class among its ancestors that another takes the place of."""
    if cls is old:
        return new
    bases = tuple(_with_base(base, old, new) if issubclass(base, old) else base for base in cls.__bases__)
    namespace = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__", _SOURCE)}
    source = vars(cls).get(_SOURCE)
    if source is not None and source.__bases__ == bases and namespace.keys() <= vars(source).keys():
        return source  # type: ignore[no-any-return]
    name = cls.__name__.replace(old.__name__, new.__name__)  # which others compose of the base's
    return type(cls)(name, bases, {**namespace, _SOURCE: cls})


def _is_overlay(cls: type) -> bool:
    """Whether a class was made on the spot by somebody else, to be put on a live module."""
    if _MIXIN in vars(cls) or "<locals>" in cls.__qualname__ or {"forward", "__init__"} & vars(cls).keys():
        return False
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is not cls
