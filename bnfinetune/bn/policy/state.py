"""What a policy has set on a layer, as plain values: the switches, what they need, and what to restore."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bnfinetune.bn.policy.rank_groups import GroupChoice

Learning = dict[str, dict[str, bool]]
"""`requires_grad` of the Parameters behind each of a layer's affine tensors, by the tensor's name and by their own in
the layer; nothing behind a buffer, and no entry for a tensor that does not exist."""

DEFAULT_MOMENTUM = 0.1


class Switches(NamedTuple):
    """What a BN layer effectively does now.

    Attributes:
        train_stats: what normalises in training: batch, running, sync, ghost, renorm or stochastic.
        update_stats: what happens to `running_*` in training: ema, cumulative or none.
        affine: trained, or frozen (no weight or bias has `requires_grad`).
        eval_stats: what normalises in evaluation: running, batch or mix.
    """

    train_stats: str
    update_stats: str
    affine: str
    eval_stats: str


@dataclass(frozen=True)
class Options:
    """What some switches need besides their value; see `BNPolicy`."""

    ghost_size: int = 32
    stochastic_p: float = 0.5
    renorm_rmax: float = 3.0
    renorm_dmax: float = 5.0
    renorm_warmup: int = 0
    renorm_ramp: int = 0
    mix_prior: float = 16.0
    domains: tuple[str, ...] = ()
    domain_affine: str = "shared"
    ranks: GroupChoice = field(default_factory=GroupChoice)

    def group(self) -> Any:
        """The process group that `sync` pools over; None where there is nothing to pool."""
        return self.ranks.resolve()


@dataclass(frozen=True)
class Original:
    """What a layer was before its first policy, for `restore_bn`.

    Attributes:
        momentum: its momentum.
        eps: its eps.
        learning: what of its affine learnt.
        added: attributes that the class does not have by itself and was lent, as frozen classes are.
    """

    momentum: float | None
    eps: float
    learning: Learning
    added: tuple[str, ...]


@dataclass(frozen=True)
class LayerState:
    """The switches of a layer that a policy has taken over; what learns and the kind of update are read off the layer.

    Attributes:
        name: the layer's qualified name, for messages.
        train_stats: what normalises in training.
        updates: whether training updates the running statistics; by which rule is the layer's `momentum` (None is
            cumulative, as in PyTorch).
        eval_stats: what normalises in evaluation.
        options: what the switches need.
        original: what to restore.
        stats_before: `train_stats` and `updates` from before the statistics were frozen.
        affine_frozen: whether the affine was frozen, so that what others put in its place does not learn either.
        affine_before: what of the affine learnt before that.
        ema_momentum: the momentum that an exponential average takes up again after a cumulative one.
        passing: taken over only for the length of a context, by no policy.
    """

    name: str
    train_stats: str
    updates: bool
    eval_stats: str
    options: Options
    original: Original
    stats_before: tuple[str, bool] | None = None
    affine_frozen: bool = False
    affine_before: Learning | None = None
    ema_momentum: float = DEFAULT_MOMENTUM
    passing: bool = False
