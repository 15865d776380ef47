"""What a policy says: four independent switches, what they need, and which layers they are meant for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

from bnfinetune.bn.layers import Selection, as_tuple
from bnfinetune.errors import PolicyError

TrainStats = Literal["batch", "running", "sync", "ghost", "renorm", "stochastic"]
UpdateStats = Literal["ema", "cumulative", "none"]
Affine = Literal["trained", "frozen"]
EvalStats = Literal["running", "batch", "mix"]
DomainAffine = Literal["shared", "own"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "train_stats": get_args(TrainStats),
    "update_stats": get_args(UpdateStats),
    "affine": get_args(Affine),
    "eval_stats": get_args(EvalStats),
    "domain_affine": get_args(DomainAffine),
}

_BOUNDS: dict[str, tuple[float, float, type]] = {
    "momentum": (0.0, 1.0, Real),
    "ghost_size": (1, math.inf, Integral),
    "stochastic_p": (0.0, 1.0, Real),
    "renorm_rmax": (1.0, math.inf, Real),
    "renorm_dmax": (0.0, math.inf, Real),
    "renorm_warmup": (0, math.inf, Integral),
    "renorm_ramp": (0, math.inf, Integral),
    "mix_prior": (0.0, math.inf, Real),
    "sync_group_size": (1, math.inf, Integral),
}

USED_BY: dict[str, tuple[str, str]] = {
    "momentum": ("update_stats", "ema"),
    "ghost_size": ("train_stats", "ghost"),
    "stochastic_p": ("train_stats", "stochastic"),
    "renorm_rmax": ("train_stats", "renorm"),
    "renorm_dmax": ("train_stats", "renorm"),
    "renorm_warmup": ("train_stats", "renorm"),
    "renorm_ramp": ("train_stats", "renorm"),
    "mix_prior": ("eval_stats", "mix"),
    "process_group": ("train_stats", "sync"),
    "sync_group_size": ("train_stats", "sync"),
}
"""The switch, and its one value, that each setting is for."""


@dataclass(frozen=True, kw_only=True)
class BNPolicy:
    """What some BN layers of a model shall do. Every field left None keeps what the layer does already.

    What a switch needs (`ghost_size`, `mix_prior`, ...) comes with the switch, or meets layers that have it already.

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
        layers: what the policy applies to: globs (`fnmatch`) on qualified layer names, classes such as
            `nn.BatchNorm1d`, functions of name and layer, or several of these.
        exclude: the same, of layers that it leaves alone.
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
        domains: names of domains that keep running statistics of their own beside the layer's (Chang et al. 2019);
            each starts from the layer's present ones, and `domain(model, name)` puts it in use.
        domain_affine: whether domains have the layer's weight and bias (`shared`) or their `own`, which start from the
            layer's and are trained by an optimizer that is built afterwards.

    Raises:
        PolicyError: a value out of its choices or bounds, or two that contradict each other.
    """

    train_stats: TrainStats | None = None
    update_stats: UpdateStats | None = None
    affine: Affine | None = None
    eval_stats: EvalStats | None = None
    layers: Selection = "*"
    exclude: Selection = ()
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
    domains: str | Sequence[str] = ()
    domain_affine: DomainAffine | None = None

    def __post_init__(self) -> None:
        for setting in (*_CHOICES, *_BOUNDS):
            if getattr(self, setting) is not None:
                check_setting(setting, getattr(self, setting))
        if self.process_group is not None and self.sync_group_size is not None:
            raise PolicyError("process_group and sync_group_size contradict each other; give one of them")
        for setting, (switch, user) in USED_BY.items():
            value, switched = getattr(self, setting), getattr(self, switch)
            if value is not None and switched not in (None, user):
                raise PolicyError(
                    f"{setting}={value!r} has no meaning with {switch}={switched!r}; leave it out, or set "
                    f"{switch}={user!r}"
                )
        ramped = self.renorm_warmup or self.renorm_ramp
        if ramped and math.inf in (self.renorm_rmax, self.renorm_dmax):
            raise PolicyError("renorm cannot ramp up to an infinite bound; give finite renorm_rmax and renorm_dmax")
        for name in as_tuple(self.domains):
            check_domain_name(name)


def check_setting(setting: str, value: Any) -> None:
    """Refuses a value that a field of `BNPolicy` cannot have.

    Raises:
        PolicyError: it is none of the choices, no number, or out of bounds.
    """
    if setting in _CHOICES:
        choices = _CHOICES[setting]
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PolicyError(f"{setting}={value!r} is not one of {', '.join(choices)}{hint}")
        return
    low, high, kind = _BOUNDS[setting]
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = "a whole number" if kind is Integral else "a number"
        raise PolicyError(f"{setting}={value!r} is not {wanted}; choose from {low:g} to {high:g}")
    number: Any = value
    if not low <= number <= high:
        raise PolicyError(f"{setting}={value!r} is out of bounds; choose from {low:g} to {high:g}")


def check_domain_name(name: Any) -> None:
    """Refuses what cannot name a domain.

    Raises:
        PolicyError: it is no identifier.
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise PolicyError(f"domain name {name!r} is no identifier; use letters, digits and underscores")


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
