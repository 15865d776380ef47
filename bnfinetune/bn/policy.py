"""Policies: the switches of many layers set at once, exactly undone, saved and described."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from bnfinetune.bn.groups import GroupChoice
from bnfinetune.bn.layers import Globs, find_bn_layers, native_class, select_layers, unwrap
from bnfinetune.bn.switches import (
    LayerState,
    Options,
    Switches,
    Trainable,
    change_listeners,
    let_go,
    native_state,
    set_trainable,
    state_of,
    switches_of,
    take_over,
    trainable,
)
from bnfinetune.errors import LayerError, PolicyError

TrainStats = Literal["batch", "running", "sync", "ghost", "renorm", "stochastic"]
UpdateStats = Literal["ema", "cumulative", "none"]
Affine = Literal["trained", "frozen"]
EvalStats = Literal["running", "batch", "mix"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "train_stats": get_args(TrainStats),
    "update_stats": get_args(UpdateStats),
    "affine": get_args(Affine),
    "eval_stats": get_args(EvalStats),
}
_FROZEN_STATS = ("running", False)


@dataclass(frozen=True, kw_only=True)
class BNPolicy:
    """What some BN layers of a model shall do. Every field left None keeps what the layer does already.

    Attributes:
        train_stats: what normalises in training. `batch`: the batch's statistics (Ioffe & Szegedy 2015); `running`:
            the running statistics, from before the update; `sync`: those of the joined batch of all ranks (Peng et al.
            2018); `ghost`: those of groups of samples (Hoffer et al. 2017); `renorm`: batch renormalisation (Ioffe
            2017); `stochastic`: batch or running, drawn per channel (Kou et al. 2020).
        update_stats: what happens to `running_*` in training. `ema`: `m <- (1 - momentum) m + momentum m_B`;
            `cumulative`: the average over all batches counted by `num_batches_tracked`; `none`: nothing.
        affine: whether weight and bias are `trained` or `frozen`.
        eval_stats: what normalises in evaluation. `running`; `batch`: the evaluated batch's; `mix`: both, with the
            running statistics counting for `mix_prior` samples (Schneider et al. 2020).
        layers: globs (`fnmatch`) on qualified layer names that the policy applies to.
        exclude: globs of layers that it leaves alone.
        momentum: weight of the newest batch in `ema`, from 0 to 1; see `auto_momentum`.
        ghost_size: samples per group of `ghost`; 32 unless said before.
        stochastic_p: chance of `stochastic` to take a channel's batch statistics; 0.5 unless said before.
        renorm_rmax: bound of renorm's scale r, at least 1; 3 unless said before.
        renorm_dmax: bound of renorm's shift d, at least 0; 5 unless said before.
        renorm_warmup: updates that renorm is plain BN for (rmax 1, dmax 0); 0 unless said before.
        renorm_ramp: updates over which its bounds then grow linearly; 0 unless said before.
        mix_prior: N of `mix`, in samples; 16 unless said before.
        process_group: ranks that `sync` pools over; all unless said before.
        sync_group_size: consecutive ranks per group of `sync`, such as the GPUs of one node, instead of a group.

    Raises:
        PolicyError: a value out of its choices or bounds, or two that contradict each other.
    """

    train_stats: TrainStats | None = None
    update_stats: UpdateStats | None = None
    affine: Affine | None = None
    eval_stats: EvalStats | None = None
    layers: Globs = "*"
    exclude: Globs = ()
    momentum: float | None = None
    ghost_size: int | None = None
    stochastic_p: float | None = None
    renorm_rmax: float | None = None
    renorm_dmax: float | None = None
    renorm_warmup: int | None = None
    renorm_ramp: int | None = None
    mix_prior: float | None = None
    process_group: Any = field(default=None, repr=False)
    sync_group_size: int | None = None

    def __post_init__(self) -> None:
        for switch, choices in _CHOICES.items():
            value = getattr(self, switch)
            if value is not None and value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise PolicyError(f"{switch}={value!r} is not one of {', '.join(choices)}{hint}")
        self._check_bounds()
        if self.process_group is not None and self.sync_group_size is not None:
            raise PolicyError("process_group and sync_group_size contradict each other; give one of them")
        if self.update_stats == "cumulative" and self.momentum is not None:
            raise PolicyError(f"momentum={self.momentum} has no meaning with update_stats='cumulative'; leave it out")
        ramped = self.renorm_warmup or self.renorm_ramp
        if ramped and math.inf in (self.renorm_rmax, self.renorm_dmax):
            raise PolicyError("renorm cannot ramp up to an infinite bound; give finite renorm_rmax and renorm_dmax")

    def _check_bounds(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "momentum": (0.0, 1.0),
            "ghost_size": (1, math.inf),
            "stochastic_p": (0.0, 1.0),
            "renorm_rmax": (1.0, math.inf),
            "renorm_dmax": (0.0, math.inf),
            "renorm_warmup": (0, math.inf),
            "renorm_ramp": (0, math.inf),
            "mix_prior": (0.0, math.inf),
            "sync_group_size": (1, math.inf),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise PolicyError(f"{name}={value!r} is out of bounds; choose from {low:g} to {high:g}")


def auto_momentum(steps_per_epoch: int) -> float:
    """A momentum that lets the running statistics forget their source within about a tenth of an epoch.

    Args:
        steps_per_epoch: forwards in training mode per epoch.

    Returns:
        `min(0.1, 10 / steps_per_epoch)`: PyTorch's default for short epochs, slower averaging for long ones.
    """
    if steps_per_epoch < 1:
        raise PolicyError(f"steps_per_epoch={steps_per_epoch} is out of bounds; give at least 1")
    return min(0.1, 10 / steps_per_epoch)


@dataclass(frozen=True)
class _Plan:
    """Everything that a policy change will set on one layer, computed before anything is touched."""

    state: LayerState
    momentum: float | None
    trainable: Trainable

    @classmethod
    def unchanged(cls, name: str, layer: nn.Module, model_training: bool) -> _Plan:
        state = state_of(layer) or native_state(name, layer, model_training)
        return cls(replace(state, name=name), getattr(layer, "momentum", state.original.momentum), trainable(layer))

    def with_policy(self, layer: nn.Module, policy: BNPolicy) -> _Plan:
        train_stats = policy.train_stats or self.state.train_stats
        updates = self.state.updates if policy.update_stats is None else policy.update_stats != "none"
        plan = self.with_stats(train_stats, updates).with_momentum(layer, policy)
        options = _merged_options(plan.state.options, policy)
        eval_stats = policy.eval_stats or plan.state.eval_stats
        plan = replace(plan, state=replace(plan.state, options=options, eval_stats=eval_stats))
        plan.check_running_stats(layer)
        return plan if policy.affine is None else plan.with_affine(layer, policy.affine)

    def with_stats(self, train_stats: str, updates: bool) -> _Plan:
        before, now = (self.state.train_stats, self.state.updates), (train_stats, updates)
        if now != _FROZEN_STATS:
            stats_before = None
        else:
            stats_before = self.state.stats_before if before == _FROZEN_STATS else before
        return replace(
            self, state=replace(self.state, train_stats=train_stats, updates=updates, stats_before=stats_before)
        )

    def with_momentum(self, layer: nn.Module, policy: BNPolicy) -> _Plan:
        ema = policy.momentum if policy.momentum is not None else self.momentum
        if policy.update_stats == "cumulative":
            if layer.running_mean is not None and "num_batches_tracked" not in self.state.original.added:
                if layer.num_batches_tracked is None:
                    raise LayerError(f"BN layer {self.state.name!r} counts no batches; use update_stats='ema'")
            remembered = self.state.ema_momentum if self.momentum is None else self.momentum
            return replace(self, momentum=None, state=replace(self.state, ema_momentum=remembered))
        if policy.update_stats == "ema" and ema is None:
            ema = self.state.ema_momentum
        return replace(self, momentum=ema)

    def with_affine(self, layer: nn.Module, affine: str) -> _Plan:
        if layer.weight is None and layer.bias is None:
            if affine == "trained":
                raise LayerError(f"BN layer {self.state.name!r} has no weight and no bias to train; exclude it")
            return self
        before = self.state.affine_before
        if affine == "trained":
            wanted = tuple(None if tensor is None else True for tensor in (layer.weight, layer.bias))
            return replace(self, trainable=wanted, state=replace(self.state, affine_before=None))
        if any(self.trainable):
            before = self.trainable
        wanted = tuple(None if flag is None else False for flag in self.trainable)
        return replace(self, trainable=wanted, state=replace(self.state, affine_before=before))

    def check_running_stats(self, layer: nn.Module) -> None:
        """Refuses switches that need running statistics on a layer that keeps none."""
        state = self.state
        needing = [value for value in (state.train_stats,) if value in ("running", "renorm", "stochastic")]
        needing += [value for value in (state.eval_stats,) if value in ("running", "mix")]
        needing += ["an update"] if state.updates else []
        if needing and layer.running_mean is None:
            raise LayerError(
                f"BN layer {state.name!r} keeps no running statistics (track_running_stats=False), which "
                f"{needing[0]} needs; exclude it"
            )


def _merged_options(options: Options, policy: BNPolicy) -> Options:
    changes = {
        option.name: value
        for option in fields(Options)
        if option.name != "ranks" and (value := getattr(policy, option.name)) is not None
    }
    if policy.process_group is not None or policy.sync_group_size is not None:
        changes["ranks"] = GroupChoice(policy.process_group, policy.sync_group_size)
    return replace(options, **changes)


def apply_policy(model: nn.Module, policy: BNPolicy | Sequence[BNPolicy]) -> nn.Module:
    """Puts BN layers under a policy, in place; policies compose, and `restore_bn` undoes them all.

    The layers stay the same module objects and instances of their class, with the same Parameters; `state_dict`
    keeps its keys, shapes and values. If anything is refused, nothing has changed.

    Args:
        model: any module with BN layers, wrapped (DDP, `torch.compile`) or not.
        policy: one policy, or several, of which later ones win where they overlap.

    Returns:
        The same model.

    Example:
        >>> apply_policy(model, [BNPolicy(train_stats="running", update_stats="none"),
        ...                      BNPolicy(train_stats="batch", update_stats="ema", layers="layer4.*")])

    Raises:
        SelectionError: a glob matches no BN layer.
        LayerError: a layer that cannot do as asked.
        PolicyError: a change of `requires_grad` below a DDP wrapper.
    """
    policies = [policy] if isinstance(policy, BNPolicy) else list(policy)
    if not policies:
        raise PolicyError("apply_policy got an empty list; give at least one BNPolicy")
    plans: dict[nn.Module, _Plan] = {}
    for each in policies:
        for name, layer in select_layers(model, each.layers, each.exclude).items():
            plan = plans.get(layer) or _Plan.unchanged(name, layer, unwrap(model).training)
            plans[layer] = plan.with_policy(layer, each)
    _carry_out(model, plans)
    return model


def _carry_out(model: nn.Module, plans: Mapping[nn.Module, _Plan]) -> None:
    _refuse_under_ddp(model, (plan.state.name for layer, plan in plans.items() if plan.trainable != trainable(layer)))
    for plan in plans.values():
        if plan.state.train_stats == "sync":
            plan.state.options.group()  # makes node-local groups now, while every rank is here
    for listener in change_listeners:
        listener(model, plans)
    for layer, plan in plans.items():
        take_over(layer, plan.state)
        layer.momentum = plan.momentum
        set_trainable(layer, plan.trainable)


def _refuse_under_ddp(model: nn.Module, changed: Iterable[str]) -> None:
    name = next(iter(changed), None)
    if name is not None and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise PolicyError(
            f"BN layer {name!r} would change requires_grad below a DistributedDataParallel wrapper, after which ranks "
            f"diverge; change the bare model (model.module) and wrap it again with the same optimizer"
        )


def restore_bn(model: nn.Module) -> nn.Module:
    """Undoes every policy: class, momentum, eps and `requires_grad` of before the first; trained values stay.

    Layers take the model's present mode, except one whose mode had been set apart before the first policy.

    Args:
        model: any module with BN layers, under policies or not.

    Returns:
        The same model.

    Raises:
        SelectionError: the model has no BN layer.
        PolicyError: a change of `requires_grad` below a DDP wrapper.
    """
    held = {layer: state for layer in find_bn_layers(model).values() if (state := state_of(layer)) is not None}
    _refuse_under_ddp(model, (s.name for layer, s in held.items() if s.original.trainable != trainable(layer)))
    for listener in change_listeners:
        listener(model, held)
    for layer in held:
        let_go(layer, unwrap(model).training)
    return model


def freeze_bn(model: nn.Module, *, stats: bool = True, affine: bool = True, layers: Globs = "*") -> nn.Module:
    """Freezes BN layers so that it holds through `train()`: a shorthand of `apply_policy`.

    Args:
        model: any module with BN layers.
        stats: normalise with the running statistics in training too, and never update them.
        affine: train neither weight nor bias.
        layers: globs on qualified layer names.

    Returns:
        The same model.

    Raises:
        SelectionError: a glob matches no BN layer.
        LayerError: a layer without running statistics.
        PolicyError: neither `stats` nor `affine`, or a change of `requires_grad` below a DDP wrapper.
    """
    _require_part("freeze_bn", stats, affine)
    return apply_policy(
        model,
        BNPolicy(
            train_stats="running" if stats else None,
            update_stats="none" if stats else None,
            affine="frozen" if affine else None,
            layers=layers,
        ),
    )


def unfreeze_bn(model: nn.Module, *, stats: bool = True, affine: bool = True, layers: Globs = "*") -> nn.Module:
    """Brings back the switches of before the freeze; layers built frozen become plain BN.

    Args:
        model: any module with BN layers.
        stats: bring back what normalised and whether it was updated.
        affine: bring back which of weight and bias learnt.
        layers: globs on qualified layer names.

    Returns:
        The same model; layers that are not frozen stay as they are.

    Raises:
        SelectionError: a glob matches no BN layer.
        PolicyError: neither `stats` nor `affine`, or a change of `requires_grad` below a DDP wrapper.
    """
    _require_part("unfreeze_bn", stats, affine)
    plans: dict[nn.Module, _Plan] = {}
    for name, layer in select_layers(model, layers).items():
        plan = _Plan.unchanged(name, layer, unwrap(model).training)
        state = plan.state
        if stats and (state.train_stats, state.updates) == _FROZEN_STATS:
            plan = plan.with_stats(*(state.stats_before or ("batch", True)))
        if affine and not any(plan.trainable) and not (layer.weight is None and layer.bias is None):
            before = plan.state.affine_before
            plan = plan.with_affine(layer, "trained")
            plan = plan if before is None else replace(plan, trainable=before)
        plans[layer] = plan
    _carry_out(model, plans)
    return model


def _require_part(name: str, stats: bool, affine: bool) -> None:
    if not (stats or affine):
        raise PolicyError(f"{name} with stats=False and affine=False would do nothing; leave one of them True")


class BNRow(NamedTuple):
    """One BN layer in the table of `describe_bn`."""

    name: str
    type: str
    train_stats: str
    update_stats: str
    affine: str
    eval_stats: str
    affine_grad: str
    momentum: float | None
    eps: float
    mode: str


class BNTable(tuple[BNRow, ...]):
    """The rows of `describe_bn`, in the model's order; prints as an aligned table."""

    def __str__(self) -> str:
        cells = [[field.replace("_", " ") for field in BNRow._fields]]
        cells += [[_shown(value) for value in row] for row in self]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value in (None, "") else str(value)


def describe_bn(model: nn.Module) -> BNTable:
    """Tabulates every BN layer: type, switches, gradients of weight and bias, momentum, eps and mode.

    Args:
        model: any module with BN layers, under a policy or not.

    Returns:
        One row per layer. A layer whose class has an unregistered `forward` shows "?" for its switches.

    Raises:
        SelectionError: the model has no BN layer.
    """
    return BNTable(_row(name, layer) for name, layer in find_bn_layers(model).items())


def _row(name: str, layer: nn.Module) -> BNRow:
    try:
        switches = switches_of(layer)
    except LayerError:
        switches = Switches("?", "?", "?", "?")
    grads = [{None: "none", True: "yes", False: "no"}[flag] for flag in trainable(layer)]
    return BNRow(
        name or "<root>",
        native_class(layer).__name__,
        *switches,
        affine_grad=grads[0] if grads[0] == grads[1] else "/".join(grads),
        momentum=getattr(layer, "momentum", None),
        eps=layer.eps,
        mode="train" if layer.training else "eval",
    )
