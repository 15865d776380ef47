"""What a policy change will do to each layer.

Worked out in full before the first layer is touched, so that a refusal leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from torch import nn

from bnfinetune.bn.layers import as_tuple, unwrap
from bnfinetune.bn.policy.rank_groups import GroupChoice
from bnfinetune.bn.policy.spec import BNPolicy
from bnfinetune.bn.policy.state import LayerState, Options, Trainable
from bnfinetune.bn.policy.switched_layer import (
    change_listeners,
    let_go,
    native_state,
    own_parameters,
    set_trainable,
    state_of,
    take_over,
    trainable,
)
from bnfinetune.errors import LayerError, PolicyError

_FROZEN_STATS = ("running", False)


@dataclass(frozen=True)
class LayerPlan:
    """Everything that a policy change will set on one layer, computed before anything is touched.

    Attributes:
        state: the state it will be under.
        momentum: its momentum; None is cumulative.
        trainable: `requires_grad` of its weight and bias.
    """

    state: LayerState
    momentum: float | None
    trainable: Trainable

    @classmethod
    def unchanged(cls, name: str, layer: Any, model_training: bool) -> LayerPlan:
        state = state_of(layer) or native_state(name, layer, model_training)
        return cls(
            replace(state, name=name, passing=False),
            getattr(layer, "momentum", state.original.momentum),
            trainable(layer),
        )

    def with_policy(self, layer: Any, policy: BNPolicy) -> LayerPlan:
        train_stats = policy.train_stats or self.state.train_stats
        updates = self.state.updates if policy.update_stats is None else policy.update_stats != "none"
        plan = self.with_stats(train_stats, updates).with_momentum(layer, policy)
        options = _merged_options(plan.state.options, policy)
        eval_stats = policy.eval_stats or plan.state.eval_stats
        plan = replace(plan, state=replace(plan.state, options=options, eval_stats=eval_stats))
        plan.check_running_stats(layer)
        return plan if policy.affine is None else plan.with_affine(layer, policy.affine)

    def with_stats(self, train_stats: str, updates: bool) -> LayerPlan:
        before, now = (self.state.train_stats, self.state.updates), (train_stats, updates)
        stats_before = self.state.stats_before if before == _FROZEN_STATS else before
        if now != _FROZEN_STATS:
            stats_before = None
        return replace(
            self, state=replace(self.state, train_stats=train_stats, updates=updates, stats_before=stats_before)
        )

    def with_momentum(self, layer: Any, policy: BNPolicy) -> LayerPlan:
        ema = policy.momentum if policy.momentum is not None else self.momentum
        if policy.update_stats == "cumulative":
            if getattr(layer, "num_batches_tracked", 0) is None:
                raise LayerError(f"BN layer {self.state.name!r} counts no batches; use update_stats='ema'")
            remembered = self.state.ema_momentum if self.momentum is None else self.momentum
            return replace(self, momentum=None, state=replace(self.state, ema_momentum=remembered))
        if policy.update_stats == "ema" and ema is None:
            ema = self.state.ema_momentum
        return replace(self, momentum=ema)

    def with_affine(self, layer: Any, affine: str) -> LayerPlan:
        if layer.weight is None and layer.bias is None:
            if affine == "trained":
                raise LayerError(f"BN layer {self.state.name!r} has no weight and no bias to train; exclude it")
            return self
        before = self.state.affine_before
        if affine == "trained":
            learn = None if layer.weight is None else True, None if layer.bias is None else True
            return replace(self, trainable=learn, state=replace(self.state, affine_before=None))
        if True in self.trainable:
            before = self.trainable
        rest = tuple(None if flag is None else False for flag in self.trainable)
        return replace(self, trainable=cast(Trainable, rest), state=replace(self.state, affine_before=before))

    def unfrozen(self, layer: Any, *, stats: bool, affine: bool) -> LayerPlan:
        plan, state = self, self.state
        if stats and (state.train_stats, state.updates) == _FROZEN_STATS:
            plan = plan.with_stats(*(state.stats_before or ("batch", True)))
        if affine and True not in plan.trainable and not (layer.weight is None and layer.bias is None):
            plan = plan.with_affine(layer, "trained")
            plan = plan if state.affine_before is None else replace(plan, trainable=state.affine_before)
        return plan

    def changes_parameters(self, layer: nn.Module) -> bool:
        """Whether Parameters are added, or begin or cease to learn."""
        if self.trainable != trainable(layer):
            return True
        state, options = state_of(layer), self.state.options
        present = state.options.domains if state is not None else ()
        return options.domain_affine == "own" and options.domains != present

    def check_running_stats(self, layer: Any) -> None:
        """Refuses switches that need running statistics on a layer that keeps none."""
        state = self.state
        needing = [state.train_stats] if state.train_stats in ("running", "renorm", "stochastic") else []
        needing += [state.eval_stats] if state.eval_stats in ("running", "mix") else []
        needing += ["an update"] if state.updates else []
        needing += ["a domain"] if state.options.domains else []
        if needing and layer.running_mean is None:
            raise LayerError(
                f"BN layer {state.name!r} keeps no running statistics (track_running_stats=False), which "
                f"{needing[0]} needs; exclude it"
            )


def _merged_options(options: Options, policy: BNPolicy) -> Options:
    changes: dict[str, Any] = {
        option.name: value
        for option in fields(Options)
        if option.name not in ("ranks", "domains") and (value := getattr(policy, option.name)) is not None
    }
    changes["domains"] = tuple(dict.fromkeys((*options.domains, *as_tuple(policy.domains))))
    if policy.process_group is not None or policy.sync_group_size is not None:
        changes["ranks"] = GroupChoice(policy.process_group, policy.sync_group_size)
    return replace(options, **changes)


def carry_out(model: nn.Module, plans: Mapping[nn.Module, LayerPlan]) -> None:
    """Sets what the plans say on their layers, or refuses before anything is touched.

    Raises:
        PolicyError: a change of Parameters below a DDP wrapper.
    """
    refuse_under_ddp(model, (plan.state.name for layer, plan in plans.items() if plan.changes_parameters(layer)))
    for plan in plans.values():
        if plan.state.train_stats == "sync" and plan.state.options.ranks.size is not None:
            plan.state.options.group()  # makes node-local groups now, while every rank is here
    for listener in change_listeners:
        listener(model, plans)
    for layer, plan in plans.items():
        take_over(layer, plan.state)
        cast(Any, layer).momentum = plan.momentum
        set_trainable(layer, plan.trainable)


def refuse_under_ddp(model: nn.Module, changed: Iterable[str]) -> None:
    """Refuses to change the Parameters of the named layers if DDP has already wrapped the model."""
    name = next(iter(changed), None)
    if name is not None and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise PolicyError(
            f"BN layer {name!r} would change requires_grad below a DistributedDataParallel wrapper, after which ranks "
            f"diverge; change the bare model (model.module) and wrap it again with the same optimizer"
        )


def undo(layers: Iterable[nn.Module], model: nn.Module) -> None:
    """Takes every policy off some layers of a model, or refuses before anything is touched.

    Raises:
        PolicyError: a change of Parameters below a DDP wrapper.
    """
    layers = list(layers)
    held = {layer: state for layer in layers if (state := state_of(layer)) is not None}
    changed = (s.name for layer, s in held.items() if s.original.trainable != trainable(layer) or own_parameters(layer))
    refuse_under_ddp(model, changed)
    for listener in change_listeners:
        listener(model, layers)
    for layer in held:
        let_go(layer, unwrap(model).training)
