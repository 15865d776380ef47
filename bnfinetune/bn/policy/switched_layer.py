"""The multi-functional BN layer: what normalises, what updates and what trains, each switched on its own.

A layer is taken over in place: its class becomes a subclass of the class it had, so that it stays the same module
object with the same Parameters, buffers, hooks and names. `state_dict` is untouched; whatever is added lives in plain
attributes and non-persistent buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import Parameter

from bnfinetune.bn.class_change import (
    has_foreign_forward,
    input_name,
    input_of_call,
    is_as_made,
    make_class,
    put_on,
    take_off,
)
from bnfinetune.bn.layers import BNClass, Tail, class_for_pickle, class_from_pickle, eps_of, require_known
from bnfinetune.bn.policy.added import ATTRIBUTES, added_affine, fit_added, remove_added, start_added
from bnfinetune.bn.policy.affine import learning_of, parameters_behind, set_learning
from bnfinetune.bn.policy.rank_groups import GroupChoice
from bnfinetune.bn.policy.rules import EVAL_RULES, TRAIN_RULES
from bnfinetune.bn.policy.state import DEFAULT_MOMENTUM, LayerState, Options, Original, Switches
from bnfinetune.bn.population import AFFINE, FRESH, Population, recomputing
from bnfinetune.errors import LayerError

_ATTRIBUTES = ("_bn_state", "_bn_holds", *FRESH)  # plain ones, besides those of what was added

_LENT = {"momentum", "eps"}  # attributes that frozen classes may do without


class SwitchedBN(nn.Module):
    """Mixed into a BN layer's class by `take_over`; never built by itself."""

    _native_class: ClassVar[type[nn.Module]]
    _bn_tail: ClassVar[Tail]
    _bn_input: ClassVar[str]
    _bn_checks_shape: ClassVar[bool]
    _bn_state: LayerState
    _bn_added: dict[str, str]
    _bn_unset: bool
    _bn_holds: int
    _bn_previous: tuple[Tensor, Tensor, Tensor | None] | None
    _bn_domain: str | None
    _bn_last_domain: str | None
    _check_input_dim: Callable[[Tensor], None]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        x = input_of_call(self._bn_input, args, kwargs)
        if self._bn_checks_shape and isinstance(x, Tensor):  # torch.fx traces with something else
            self._check_input_dim(x)
        state = self._bn_state
        rule = TRAIN_RULES[state.train_stats] if self.training else EVAL_RULES[state.eval_stats]
        return type(self)._bn_tail(self, rule(self._bn_population(), state.options, x))

    def _bn_population(self) -> Population:
        state = self._bn_state
        if self._bn_unset:
            start_added(self)
        population = Population(self, self._bn_present_domain(), state.name, state.updates)
        if state.affine_frozen:
            population.hold_affine()
        return population

    def _bn_present_domain(self) -> str | None:
        """The domain whose statistics count; on recomputation in backward, that of the last forward in training."""
        if not self._bn_state.options.domains or torch.compiler.is_compiling():
            return self._bn_domain
        if recomputing():
            return self._bn_last_domain
        if self.training:
            self._bn_last_domain = self._bn_domain
        return self._bn_domain

    def extra_repr(self) -> str:
        shown = [super().extra_repr(), "switches=({}, {}, {}, {})".format(*switches_of(self))]
        return ", ".join(part for part in shown if part)

    def reset_running_stats(self) -> None:
        """Resets the statistics that count now, unless training leaves them alone: then others shall too."""
        stats = self._bn_population().stats
        if stats is not None and self._bn_state.updates and not self._bn_holds:
            with torch.no_grad():
                stats.mean.zero_()
                stats.var.fill_(1)
                if stats.batches is not None:
                    stats.batches.zero_()

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Registers a Parameter, which is frozen in the place of a frozen weight or bias, or behind one."""
        super().register_parameter(name, param)
        held = "_bn_state" in vars(self) and self._bn_state.affine_frozen
        if held and param is not None and name.startswith((*AFFINE, *added_affine(self))):
            param.requires_grad_(False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in added_affine(self):
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        own = {name: self._parameters.pop(name) for name in added_affine(self) if name in self._parameters}
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            self._parameters.update(own)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not is_as_made(self):
            return super().__reduce_ex__(protocol)
        state: Any = self.__getstate__()  # type: ignore[no-untyped-call]
        return blank_layer, class_for_pickle(self), {**state, **FRESH, "_bn_holds": 0}


class _AnyDimBatchNorm(_BatchNorm):
    """Stands in for `nn.SyncBatchNorm`, which DDP refuses on the CPU whatever it computes."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")


@cache
def _switched_class(native: Any, known: BNClass) -> type[SwitchedBN]:
    base = _AnyDimBatchNorm if issubclass(native, nn.SyncBatchNorm) else native
    check = getattr(base, "_check_input_dim", _NormBase._check_input_dim)
    made = make_class(
        f"Switched{native.__name__}",
        SwitchedBN,
        native,
        base=base,
        _native_class=native,
        _bn_known=known,
        _bn_tail=staticmethod(known.tail),
        _bn_input=input_name(native),
        _bn_checks_shape=check is not _NormBase._check_input_dim,
    )
    return cast(type[SwitchedBN], made)


def _put_on(layer: nn.Module, known: BNClass) -> None:
    put_on(layer, lambda native: _switched_class(native, known))


def blank_layer(native: Any, known: BNClass | None = None) -> nn.Module:
    """A layer of a class under a policy, without any attributes yet: what unpickling starts from."""
    layer: nn.Module = native.__new__(native)
    _put_on(layer, class_from_pickle(native, known))
    return layer


def state_of(layer: nn.Module) -> LayerState | None:
    """The state of a layer that a policy has taken over, else None."""
    return layer._bn_state if isinstance(layer, SwitchedBN) else None


def switches_of(layer: nn.Module) -> Switches:
    """What a BN layer effectively does now, under a policy or by itself.

    A plain layer is `batch, ema, trained, running` in either mode; a frozen class of torchvision or timm is
    `running, none, frozen, running`; one without running statistics is `batch, none, trained, batch`.

    Args:
        layer: a BN layer.

    Raises:
        LayerError: the layer's class has a `forward` of its own and is not registered.
    """
    affine = "trained" if True in trainable(layer) else "frozen"
    state = state_of(layer)
    if state is None:
        train_stats, updates, eval_stats = _native_switches(layer)
    else:
        train_stats, updates, eval_stats = state.train_stats, state.updates, state.eval_stats
    update_stats = "none" if not updates else "ema" if layer.momentum is not None else "cumulative"
    return Switches(train_stats, update_stats, affine, eval_stats)


def _native_switches(layer: Any) -> tuple[str, bool, str]:
    if require_known(layer).frozen:
        return "running", False, "running"
    tracked = layer.running_mean is not None
    train_stats = "sync" if isinstance(layer, nn.SyncBatchNorm) else "batch"
    return train_stats, tracked and getattr(layer, "track_running_stats", True), "running" if tracked else "batch"


def trainable(layer: nn.Module) -> tuple[bool | None, bool | None]:
    """Whether weight and bias learn, wherever they live; None for one that does not exist or is a buffer."""
    return _trains(layer, "weight"), _trains(layer, "bias")


def _trains(layer: nn.Module, tensor: str) -> bool | None:
    behind = parameters_behind(layer, tensor)
    if not behind:
        return None
    state = state_of(layer)
    held = state is not None and state.affine_frozen and tensor not in behind
    return not held and any(own.requires_grad for own in behind.values())


def native_state(name: str, layer: Any) -> LayerState:
    """The state under which a layer without a policy would go on as it does by itself.

    Raises:
        LayerError: the layer's class has a `forward` of its own and is not registered, or the layer has attributes of
            the names that a policy uses.
    """
    require_known(layer, name)
    taken = [key for key in (*_ATTRIBUTES, *ATTRIBUTES) if key in vars(layer)]
    if taken:
        raise LayerError(f"BN layer {name!r} has an attribute {taken[0]!r}, which policies use; rename that")
    train_stats, updates, eval_stats = _native_switches(layer)
    lent = {key: hasattr(layer, key) for key in sorted(_LENT)}
    lent |= {"num_batches_tracked": "num_batches_tracked" in layer._buffers}
    momentum = getattr(layer, "momentum", DEFAULT_MOMENTUM)
    original = Original(
        momentum=momentum,
        eps=eps_of(layer, name),
        learning=learning_of(layer),
        added=tuple(name for name, present in lent.items() if not present),
    )
    ranks = GroupChoice(process_group=getattr(layer, "process_group", None))
    ema_momentum = DEFAULT_MOMENTUM if momentum is None else momentum
    return LayerState(name, train_stats, updates, eval_stats, Options(ranks=ranks), original, ema_momentum=ema_momentum)


def require_own_forward(layer: nn.Module, name: str) -> None:
    """Refuses a layer whose `forward` was replaced.

    Raises:
        LayerError: the layer keeps a `forward` that is neither its class's nor accelerate's around that.
    """
    if has_foreign_forward(layer):
        raise LayerError(
            f"the forward of BN layer {name!r} was replaced (layer.forward = ...), which hides whatever its class "
            f"computes; take that off first (del layer.forward), use a forward hook instead, or exclude the layer"
        )


def take_over(layer: Any, state: LayerState) -> None:
    """Puts a layer under a state, in place; a layer already taken over only changes its state."""
    if not isinstance(layer, SwitchedBN):
        for key in _LENT.intersection(state.original.added):
            setattr(layer, key, getattr(state.original, key))
        vars(layer).update(_bn_holds=0, _bn_added={}, _bn_unset=False, **FRESH)
        _put_on(layer, require_known(layer, state.name))
    layer._bn_state = state
    fit_added(layer, state)


def give_back(layer: Any) -> None:
    """Gives a layer its class back, and takes back what it was lent; everything else stays as it is."""
    lent = _LENT.intersection(layer._bn_state.original.added)
    take_off(layer, SwitchedBN)
    remove_added(layer)
    for name in (*lent, *_ATTRIBUTES):
        delattr(layer, name)


def let_go(layer: Any) -> None:
    """Gives a layer back as it was before its first policy; values that training changed, and its mode, stay."""
    original = layer._bn_state.original
    layer.momentum, layer.eps = original.momentum, original.eps
    set_learning(layer, original.learning)
    give_back(layer)


# Called before a policy changes layers, with the model and those layers: folding undoes itself here.
change_listeners: list[Callable[[nn.Module, Iterable[nn.Module]], None]] = []
