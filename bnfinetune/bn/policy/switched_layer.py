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

from bnfinetune.bn.class_change import is_as_made, make_class, put_on, take_off
from bnfinetune.bn.layers import BNClass, Tail, class_for_pickle, class_from_pickle, eps_of, require_known
from bnfinetune.bn.policy.rank_groups import GroupChoice
from bnfinetune.bn.policy.rules import EVAL_RULES, TRAIN_RULES
from bnfinetune.bn.policy.state import DEFAULT_MOMENTUM, LayerState, Options, Original, Switches, Trainable
from bnfinetune.bn.population import (
    AFFINE,
    DOMAIN_PREFIX,
    FRESH,
    RENORM_AGE,
    STATS,
    Population,
    domain_key,
    recomputing,
)

_LENT = {"momentum", "eps"}  # attributes that frozen classes may do without


class SwitchedBN(nn.Module):
    """Mixed into a BN layer's class by `take_over`; never built by itself."""

    _native_class: ClassVar[type[nn.Module]]
    _bn_tail: ClassVar[Tail]
    _bn_checks_shape: ClassVar[bool]
    _bn_state: LayerState
    _bn_holds: int
    _bn_previous: tuple[Tensor, Tensor, Tensor | None] | None
    _bn_domain: str | None
    _bn_last_domain: str | None
    _check_input_dim: Callable[[Tensor], None]

    def forward(self, x: Tensor) -> Tensor:
        if self._bn_checks_shape:
            self._check_input_dim(x)
        state = self._bn_state
        rule = TRAIN_RULES[state.train_stats] if self.training else EVAL_RULES[state.eval_stats]
        return type(self)._bn_tail(self, rule(self._bn_population(), state.options, x))

    def _bn_population(self) -> Population:
        state = self._bn_state
        return Population(self, self._bn_present_domain(), state.name, state.updates)

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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in own_parameters(self):
            del destination[prefix + name]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        own = {name: self._parameters.pop(name) for name in own_parameters(self)}
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


def trainable(layer: nn.Module) -> Trainable:
    """`requires_grad` of a layer's weight and bias; None for one that does not exist or is a buffer."""
    parameters = dict(layer._parameters.items())
    weight, bias = parameters.get("weight"), parameters.get("bias")
    return None if weight is None else weight.requires_grad, None if bias is None else bias.requires_grad


def set_trainable(layer: nn.Module, wanted: Trainable) -> None:
    """Makes weight and bias learn or not.

    A changed Parameter loses its gradient, which would still move it. Where a class holds them as buffers, training
    makes them Parameters, and None makes them buffers again, of the same memory either way.
    """
    for name, flag in zip(("weight", "bias"), wanted, strict=True):
        parameter, buffer = layer._parameters.get(name), layer._buffers.get(name)
        if buffer is not None and flag:
            del layer._buffers[name]
            layer.register_parameter(name, Parameter(buffer))
        elif parameter is not None and flag is None:
            del layer._parameters[name]
            layer.register_buffer(name, parameter.detach())
        elif parameter is not None and parameter.requires_grad != flag:
            parameter.requires_grad_(bool(flag))
            parameter.grad = None
        for own in [own for key, own in own_parameters(layer).items() if key.endswith(name)]:
            if own.requires_grad != bool(flag):
                own.requires_grad_(bool(flag))
                own.grad = None


def native_state(name: str, layer: Any, model_training: bool) -> LayerState:
    """The state under which a layer without a policy would go on as it does by itself.

    Raises:
        LayerError: the layer's class has a `forward` of its own and is not registered.
    """
    require_known(layer, name)
    train_stats, updates, eval_stats = _native_switches(layer)
    lent = {key: hasattr(layer, key) for key in sorted(_LENT)}
    lent |= {"num_batches_tracked": "num_batches_tracked" in layer._buffers}
    momentum = getattr(layer, "momentum", DEFAULT_MOMENTUM)
    original = Original(
        momentum=momentum,
        eps=eps_of(layer, name),
        trainable=trainable(layer),
        apart=layer.training if layer.training != model_training else None,
        added=tuple(name for name, present in lent.items() if not present),
    )
    ranks = GroupChoice(process_group=getattr(layer, "process_group", None))
    ema_momentum = DEFAULT_MOMENTUM if momentum is None else momentum
    return LayerState(name, train_stats, updates, eval_stats, Options(ranks=ranks), original, ema_momentum=ema_momentum)


def take_over(layer: Any, state: LayerState) -> None:
    """Puts a layer under a state, in place; a layer already taken over only changes its state."""
    if not isinstance(layer, SwitchedBN):
        for key in _LENT.intersection(state.original.added):
            setattr(layer, key, getattr(state.original, key))
        if "num_batches_tracked" in state.original.added:
            _add_buffer(layer, "num_batches_tracked", torch.zeros((), dtype=torch.long))
        vars(layer).update(_bn_holds=0, **FRESH)
        _put_on(layer, require_known(layer, state.name))
    layer._bn_state = state
    _fit_extra_tensors(layer, state.options)


def _fit_extra_tensors(layer: Any, options: Options) -> None:
    """Adds what the options need beyond the layer's own tensors, and drops what they no longer need."""
    domains, own_affine = options.domains, options.domain_affine == "own"
    needed = {domain_key(domain, name): name for domain in domains for name in STATS}
    needed |= {domain_key(domain, name): name for domain in domains if own_affine for name in AFFINE}
    if layer._bn_state.train_stats == "renorm" and (options.renorm_warmup or options.renorm_ramp):
        needed[RENORM_AGE] = ""
    for key in [
        key for key in (*layer._buffers, *layer._parameters) if key.startswith(DOMAIN_PREFIX) and key not in needed
    ]:
        delattr(layer, key)
    for key in [key for key in needed if key not in layer._buffers and key not in layer._parameters]:
        source = getattr(layer, needed[key]) if needed[key] else torch.zeros((), dtype=torch.long)
        if needed[key] not in AFFINE:
            _add_buffer(layer, key, source)
        elif source is not None:
            own = Parameter(source.detach().clone(), requires_grad=source.requires_grad)
            layer.register_parameter(key, own)


def _add_buffer(layer: Any, name: str, value: Tensor | None) -> None:
    copy = None if value is None else value.detach().clone().to(layer.running_mean.device)
    layer.register_buffer(name, copy, persistent=False)


def extra_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors that policies have added to a layer and `state_dict` does not carry."""
    state = state_of(layer)
    if state is None:
        return {}
    lent = [name for name in state.original.added if name in layer._buffers]
    tensors = {**layer._buffers, **layer._parameters}
    added = {name: tensor for name, tensor in tensors.items() if name.startswith(DOMAIN_PREFIX) or name in lent}
    return {name: tensor for name, tensor in added.items() if tensor is not None}


def own_parameters(layer: nn.Module) -> dict[str, Parameter]:
    """The Parameters that domains have of their own in a layer."""
    return {name: own for name, own in layer._parameters.items() if name.startswith(DOMAIN_PREFIX) and own is not None}


def give_back(layer: Any) -> None:
    """Gives a layer its class back, and takes back what it was lent; everything else stays as it is."""
    lent = [*extra_tensors(layer), *_LENT.intersection(layer._bn_state.original.added)]
    take_off(layer, SwitchedBN)
    for name in lent:
        delattr(layer, name)
    for name in [name for name in vars(layer) if name.startswith("_bn_")]:
        delattr(layer, name)


def let_go(layer: Any, model_training: bool) -> None:
    """Gives a layer back as it was before its first policy, in the model's mode; values that training changed stay."""
    original = layer._bn_state.original
    layer.momentum, layer.eps = original.momentum, original.eps
    set_trainable(layer, original.trainable)
    give_back(layer)
    if original.apart is None:
        layer.training = model_training
    else:
        layer.train(original.apart)


# Called before a policy changes layers, with the model and those layers: folding undoes itself here.
change_listeners: list[Callable[[nn.Module, Iterable[nn.Module]], None]] = []
