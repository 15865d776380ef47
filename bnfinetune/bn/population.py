"""One BN layer's population: its running statistics and affine, how training moves them, and what they were before.

Whatever reads or writes the statistics or the affine of a layer does it through here: the rules of normalising,
folding, and statistics computed anew. A layer with domains has several populations, of which one counts at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnfinetune.bn.functional import is_traced
from bnfinetune.bn.layers import computable_eps, is_scripted, require_known
from bnfinetune.errors import LayerError, StatisticsError

STATS = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")
RENORM_AGE = "bn_renorm_age"
DOMAIN_PREFIX = "bn_"

# What a forward leaves behind in a layer, and no copy of the layer takes along.
FRESH: dict[str, Any] = {"_bn_domain": None, "_bn_last_domain": None, "_bn_previous": None}


class RunningStats(NamedTuple):
    """The buffers that hold one population's statistics: mean (C,), unbiased variance (C,), batches seen."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None


def domain_key(domain: str, name: str) -> str:
    """The name under which a layer keeps a domain's own tensor, such as its `running_mean`."""
    return f"{DOMAIN_PREFIX}{domain}_{name}"


@torch.library.custom_op("bnfinetune::kept_value", mutates_args=())
def _kept_value(x: Tensor) -> Tensor:
    return x.clone()


@_kept_value.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def kept_value(x: Tensor) -> Tensor:
    """A copy of a buffer that is about to change, for use in backward.

    Inductor would take a plain clone for cheap enough to make again in backward, by when the buffer has changed.
    """
    return _kept_value(x) if torch.compiler.is_compiling() else x.clone()


def recomputing() -> bool:
    """Whether this forward runs inside backward, as gradient checkpointing does to recompute activations."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Population:
    """What a BN layer of C channels normalises with now, and how training moves it.

    A view of the layer, made anew for each forward: copies and replicas of a layer have populations of their own.

    Args:
        layer: the layer, under a policy or not.
        domain: the domain whose statistics count; None for the layer's own.
        name: the layer's qualified name, for messages.
        updates: whether training moves the statistics.

    Attributes:
        stats: the running statistics; None where the layer keeps none.
        weight: (C,), or None for one.
        bias: (C,), or None for zero.
        eps: added to the variance.
        momentum: weight of the newest batch; None for a cumulative average.
    """

    def __init__(self, layer: Any, domain: str | None = None, name: str = "", updates: bool = False) -> None:
        self.layer = layer
        self.name = name
        self.updates = updates
        keys = STATS if domain is None else [domain_key(domain, key) for key in STATS]
        mean, var, batches = (layer._buffers.get(key) for key in keys)
        self.stats = None if mean is None or var is None else RunningStats(mean, var, batches)
        self._affine_keys = AFFINE
        if domain is not None and domain_key(domain, "weight") in layer._bn_added:
            self._affine_keys = domain_key(domain, "weight"), domain_key(domain, "bias")
        self.weight: Tensor | None = getattr(layer, self._affine_keys[0])
        self.bias: Tensor | None = getattr(layer, self._affine_keys[1], None)
        self.eps = computable_eps(layer, name)
        self.momentum: float | None = getattr(layer, "momentum", 0.1)  # PyTorch's default

    @property
    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias, each (C,) or None."""
        return self.weight, self.bias

    def hold_affine(self) -> None:
        """Cuts weight and bias off from what they are computed from; a Parameter says itself whether it learns."""
        known = self.layer._parameters
        if self._affine_keys[0] not in known and self.weight is not None and self.weight.requires_grad:
            self.weight = self.weight.detach()
        if self._affine_keys[1] not in known and self.bias is not None and self.bias.requires_grad:
            self.bias = self.bias.detach()

    def require_stats(self) -> RunningStats:
        """The running statistics.

        Raises:
            LayerError: the layer has lost them.
        """
        if self.stats is None:
            raise LayerError(f"BN layer {self.name!r} has lost its running statistics; set them again")
        return self.stats

    def require_many(self, x: Tensor) -> None:
        """Refuses a batch whose statistics would be of one value per channel.

        Raises:
            StatisticsError: the batch (N, C, ...) holds one value per channel.
        """
        if x.numel() == x.shape[1]:
            raise StatisticsError(
                f"BN layer {self.name!r} got one value per channel ({'x'.join(map(str, x.shape))}) to take "
                f"statistics of; use a larger batch, drop the last incomplete one, or set train_stats='running'"
            )

    def require_tensor(self, x: Tensor, switch: str) -> None:
        """Refuses to be traced by `torch.fx`, which sees no numbers to decide by.

        Raises:
            LayerError: the batch is no tensor but stands for one.
        """
        if is_traced(x):
            raise LayerError(
                f"BN layer {self.name!r} cannot be traced by torch.fx under {switch}; trace the model in evaluation "
                "mode with eval_stats='running', with frozen statistics, or use torch.export"
            )

    def before_update(self) -> tuple[Tensor, Tensor]:
        """Mean and variance as they were before this forward's update, on recomputation too."""
        layer, stats = self.layer, self.require_stats()
        if recomputing() and layer._bn_previous is not None:
            mean, var, _ = layer._bn_previous
            return mean, var
        before = kept_value(stats.mean), kept_value(stats.var)
        if not torch.compiler.is_compiling():
            age = layer._buffers.get(RENORM_AGE)
            layer._bn_previous = (*before, None if age is None else age.clone())
        return before

    def update(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics towards a batch's mean and unbiased variance, each (C,)."""
        stats = self.require_stats()
        weight: float | Tensor
        if self.momentum is not None:
            weight = self.momentum
        elif stats.batches is not None:
            weight = 1 / (stats.batches + 1).to(stats.mean.dtype)
        else:
            raise LayerError(f"BN layer {self.name!r} counts no batches to average over; give it a momentum")
        mean, var = mean.to(stats.mean.dtype), var.to(stats.var.dtype)
        self.commit(torch.lerp(stats.mean, mean, weight), torch.lerp(stats.var, var, weight))

    def commit(self, mean: Tensor, var: Tensor) -> None:
        """Writes new running statistics where they are finite: channel by channel, or for a cumulative average whole.

        Nothing is written within `no_stat_updates`, nor while gradient checkpointing computes a forward again.
        """
        if self.layer._bn_holds or recomputing():
            return
        stats = self.require_stats()
        # A mean that is not finite always comes with a variance that is not.
        sound = var < torch.inf
        if self.momentum is None:
            sound = sound.all()  # an average over all batches counts each of them for all channels or for none
        torch.where(sound, mean, stats.mean, out=stats.mean)
        torch.where(sound, var, stats.var, out=stats.var)
        if stats.batches is not None:
            stats.batches.add_(sound if self.momentum is None else 1)

    def renorm_age(self) -> Tensor | None:
        """Updates that renorm's schedule is old, a scalar, on recomputation as it was; None without a schedule.

        Call `before_update` first.
        """
        age: Tensor | None = self.layer._buffers.get(RENORM_AGE)
        if age is None:
            return None
        previous = self.layer._bn_previous
        if recomputing() and previous is not None and previous[2] is not None:
            recorded: Tensor = previous[2]
            return recorded
        return kept_value(age) if torch.compiler.is_compiling() else age

    def grow_older(self) -> None:
        """Takes renorm's schedule one update further."""
        age = self.layer._buffers.get(RENORM_AGE)
        if age is not None and not (self.layer._bn_holds or recomputing()):
            age.add_(1)


def population_of(layer: nn.Module) -> Population:
    """The population that a BN layer normalises with now, under a policy or not.

    Raises:
        LayerError: the layer is scripted.
    """
    if is_scripted(layer):
        require_known(layer)
    under_policy = getattr(layer, "_bn_population", None)
    return Population(layer) if under_policy is None else under_policy()
