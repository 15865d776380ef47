"""What a policy change will do to each layer.

Worked out in full before the first layer is touched, so that a refusal leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from torch import nn
from torch.nn.parameter import Parameter

from bnfinetune.bn.layers import as_tuple, find_bn_layers
from bnfinetune.bn.policy.added import added_affine, added_names, check_names, check_removal, needed_tensors
from bnfinetune.bn.policy.affine import (
    affine_parameters,
    all_learning,
    changes_learning,
    learning_of,
    learns,
    parameters_behind,
    set_learning,
    wanted_of,
)
from bnfinetune.bn.policy.marks import mark, unmark
from bnfinetune.bn.policy.rank_groups import GroupChoice
from bnfinetune.bn.policy.spec import USED_BY, BNPolicy
from bnfinetune.bn.policy.state import LayerState, Learning, Options
from bnfinetune.bn.policy.switched_layer import (
    change_listeners,
    let_go,
    native_state,
    require_own_forward,
    state_of,
    switches_of,
    take_over,
)
from bnfinetune.bn.population import AFFINE
from bnfinetune.errors import LayerError, PolicyError

_FROZEN_STATS = ("running", False)


@dataclass(frozen=True)
class LayerPlan:
    """Everything that a policy change will set on one layer, computed before anything is touched.

    Attributes:
        state: the state it will be under.
        momentum: its momentum; None is cumulative.
        learning: what of its affine will learn; None leaves that alone.
    """

    state: LayerState
    momentum: float | None
    learning: Learning | None = None

    @classmethod
    def unchanged(cls, name: str, layer: Any) -> LayerPlan:
        """A plan that goes on as a layer does, under a policy or not.

        Raises:
            LayerError: the layer cannot be taken over.
        """
        require_own_forward(layer, name)
        state = state_of(layer) or native_state(name, layer)
        return cls(replace(state, name=name, passing=False), getattr(layer, "momentum", state.original.momentum))

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
        learning = learning_of(layer) if self.learning is None else self.learning
        if not learning:
            if affine == "trained":
                raise LayerError(f"BN layer {self.state.name!r} has no weight and no bias to train; exclude it")
            return self
        if affine == "trained":
            state = replace(self.state, affine_frozen=False, affine_before=None)
            return replace(self, learning=all_learning(learning, True), state=state)
        before = learning if learns(learning) and not self.state.affine_frozen else self.state.affine_before
        state = replace(self.state, affine_frozen=True, affine_before=before)
        return replace(self, learning=all_learning(learning, False), state=state)

    def unfrozen(self, layer: Any, *, stats: bool, affine: bool) -> LayerPlan:
        plan, state = self, self.state
        if stats and (state.train_stats, state.updates) == _FROZEN_STATS:
            plan = plan.with_stats(*(state.stats_before or ("batch", True)))
        learning = learning_of(layer)
        if affine and learning and (state.affine_frozen or not learns(learning)):
            plan = plan.with_affine(layer, "trained")
            plan = plan if state.affine_before is None else replace(plan, learning=state.affine_before)
        return plan

    def changes(self, layer: nn.Module) -> bool:
        """Whether carrying it out would change anything."""
        state, ranks = state_of(layer), self.state.options.ranks
        same_ranks = state is not None and state.options.ranks.process_group is ranks.process_group
        same = state == self.state and same_ranks and cast(Any, layer).momentum == self.momentum
        return not same or self.changes_parameters(layer)

    def changes_parameters(self, layer: nn.Module) -> bool:
        """Whether Parameters are added, or begin or cease to learn."""
        if self.learning is not None and changes_learning(layer, self.learning):
            return True
        needed = {name for name, source in needed_tensors(layer, self.state).items() if source in AFFINE}
        return needed != added_affine(layer).keys()

    def check_use(self, policy: BNPolicy) -> None:
        """Refuses what a policy sets for a switch that it leaves as it is, and that is set to something else."""
        state = self.state
        update_stats = "none" if not state.updates else "ema" if self.momentum is not None else "cumulative"
        now = {"train_stats": state.train_stats, "update_stats": update_stats, "eval_stats": state.eval_stats}
        for setting, (switch, user) in USED_BY.items():
            value = getattr(policy, setting)
            if value is not None and getattr(policy, switch) is None and now[switch] != user:
                raise PolicyError(
                    f"BN layer {state.name!r} has {switch}={now[switch]!r}, which does not use {setting}={value!r}; "
                    f"set {switch}={user!r} too, or select the layers that have it"
                )
        if policy.domain_affine is not None and not state.options.domains:
            raise PolicyError(
                f"BN layer {state.name!r} has no domains, so domain_affine={policy.domain_affine!r} has no meaning; "
                f"set domains= too"
            )

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


def carry_out(model: nn.Module, plans: Mapping[nn.Module, LayerPlan], undone: Iterable[nn.Module] = ()) -> None:
    """Sets what the plans say on their layers and takes every policy off others, or refuses before anything is touched.

    Raises:
        LayerError: a layer's own names or its replaced `forward` stand in the way.
        PolicyError: a change of Parameters below a DDP wrapper, or one Parameter that shall learn and not learn.
    """
    undone = list(undone)
    released = {layer: state for layer in undone if (state := state_of(layer)) is not None}
    meant = list(plans)
    plans = {layer: plan for layer, plan in plans.items() if plan.changes(layer)}
    for layer, state in released.items():
        require_own_forward(layer, state.name)
        check_removal(layer, state.name, added_names(layer))
    for layer, plan in plans.items():
        check_names(layer, plan.state)
    changed = [plan.state.name for layer, plan in plans.items() if plan.changes_parameters(layer)]
    changed += [state.name for layer, state in released.items() if _release_changes_parameters(layer, state)]
    refuse_under_ddp(model, changed)
    plans = _aware_of_shared(model, plans)
    for plan in plans.values():
        if plan.state.train_stats == "sync" and plan.state.options.ranks.size is not None:
            plan.state.options.group()  # makes node-local groups now, while every rank is here
    for listener in change_listeners:
        listener(model, [*plans, *undone])  # layers without a policy too: those that a class freezes can be folded
    for layer, plan in plans.items():
        take_over(layer, plan.state)
        cast(Any, layer).momentum = plan.momentum
        if plan.learning is not None:
            set_learning(layer, plan.learning)
    mark(model, {layer: switches_of(layer) for layer in meant})
    for layer in released:
        let_go(layer)
    unmark(model, released)


def _release_changes_parameters(layer: nn.Module, state: LayerState) -> bool:
    return bool(added_affine(layer)) or changes_learning(layer, state.original.learning)


def _aware_of_shared(model: nn.Module, plans: Mapping[nn.Module, LayerPlan]) -> dict[nn.Module, LayerPlan]:
    """The plans with what Parameters did before the first policy, of whichever layer that has them too.

    Raises:
        PolicyError: a Parameter of two layers shall learn in one and is frozen in the other.
    """
    first: dict[Parameter, bool] = {}
    frozen: dict[Parameter, str] = {}
    for layer in find_bn_layers(model).values():
        present = state_of(layer)
        state = plans[layer].state if layer in plans else present
        if present is not None:
            first = dict(wanted_of(layer, present.original.learning)) | first
        if state is not None and state.affine_frozen:
            frozen |= dict.fromkeys(affine_parameters(layer), state.name)
    for layer, plan in plans.items():
        for own, flag in () if plan.learning is None else wanted_of(layer, plan.learning):
            if flag and frozen.get(own, plan.state.name) != plan.state.name:
                raise PolicyError(
                    f"BN layer {plan.state.name!r} shares its weight or bias with {frozen[own]!r}, which is frozen; "
                    f"give both the same affine="
                )
    return {layer: plan if state_of(layer) else _with_first(plan, layer, first) for layer, plan in plans.items()}


def _with_first(plan: LayerPlan, layer: nn.Module, first: Mapping[Parameter, bool]) -> LayerPlan:
    behind = {tensor: parameters_behind(layer, tensor) for tensor in plan.state.original.learning}
    learning = {
        tensor: {name: first.get(own, own.requires_grad) for name, own in found.items()}
        for tensor, found in behind.items()
    }
    return replace(plan, state=replace(plan.state, original=replace(plan.state.original, learning=learning)))


def refuse_under_ddp(model: nn.Module, changed: Iterable[str]) -> None:
    """Refuses to change the Parameters of the named layers if DDP has already wrapped the model."""
    name = next(iter(changed), None)
    if name is not None and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise PolicyError(
            f"BN layer {name!r} would change requires_grad below a DistributedDataParallel wrapper, after which ranks "
            f"diverge; change the bare model (model.module) and wrap it again with the same optimizer"
        )
