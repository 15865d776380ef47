"""What `precise_bn` did: per layer, in numbers, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bnfinetune.bn.saved_report import SavedReport
from bnfinetune.bn.statistics.label_order import is_read_in_stored_order
from bnfinetune.bn.statistics.layer_statistics import LayerStatistics, NewStatistics
from bnfinetune.bn.statistics.sampling_error import MIN_GROUPS
from bnfinetune.bn.statistics.shrinkage import Stored, collapsed_channels
from bnfinetune.bn.statistics.statistics_pass import Limits, Pass

_NOTABLE_CORRELATION = 0.3
_SHOWN = 8  # channels named in a line


@dataclass(frozen=True)
class LayerChange:
    """How one layer's statistics changed.

    Attributes:
        values: values per channel that the new statistics stand for, N*H*W over all batches and ranks.
        mean_shift: largest change of a channel's mean, in units of the old standard deviation `sqrt(v + eps)`.
        mean_shift_rms: root mean square of these over the channels.
        var_ratio_min: smallest ratio of new to old `v + eps` over the channels.
        var_ratio_max: largest ratio.
        error_mean: estimated standard error of the worst channel's mean, in units of its standard deviation; None if
            unknown.
        error_var: estimated relative standard error of the worst channel's variance; None if unknown.
        reread: whether the layer's inputs were read a second time for exactness.
        collapsed: channels whose variance on the data, `v + eps`, is below a hundredth of what was stored: without a
            prior they amplify their noise more than ten times as much as before.
    """

    values: int
    mean_shift: float
    mean_shift_rms: float
    var_ratio_min: float
    var_ratio_max: float
    error_mean: float | None
    error_var: float | None
    reread: bool
    collapsed: tuple[int, ...] = ()


@dataclass(frozen=True)
class PreciseBNReport(SavedReport):
    """The outcome of one pass; `print(report)` shows a table, `report.save(path)` writes JSON.

    Attributes:
        layers: the updated layers by qualified name.
        uncalled: selected layers that no batch reached; they keep their statistics.
        frozen: selected layers whose statistics a policy or their class has frozen; they keep them.
        untracked: selected layers that have no running statistics.
        reread: layers whose inputs were read a second time for exactness.
        variance: the estimate: pooled, mean or ema.
        share: weight of the data's statistics beside the stored ones, `n / (N + n)` under a prior of N; 1 without one.
        samples: images read by all ranks, without padding.
        batches: batches read by all ranks.
        tolerance: what was asked for; None if nothing.
        error: estimated standard error of the worst channel of all updated layers, of its mean (in units of its
            standard deviation) or variance (relative), whichever is larger; None if unknown.
        seconds: duration of the pass.
        warnings: reasons to doubt the statistics or their error.
    """

    layers: dict[str, LayerChange]
    uncalled: tuple[str, ...]
    frozen: tuple[str, ...]
    untracked: tuple[str, ...]
    variance: str
    share: float
    samples: int
    batches: int
    tolerance: float | None
    error: float | None
    seconds: float
    warnings: tuple[str, ...]

    @property
    def reread(self) -> tuple[str, ...]:
        """Names of the layers whose inputs were read a second time for exactness."""
        return tuple(name for name, change in self.layers.items() if change.reread)

    @property
    def converged(self) -> bool | None:
        """Whether the tolerance was reached; None without one."""
        if self.tolerance is None:
            return None
        return self.error is not None and self.error <= self.tolerance

    @property
    def weighed(self) -> str:
        """What to say of the samples where the stored statistics count beside them; nothing where they do not."""
        return "" if self.share == 1 else f", which weigh {self.share:.2g} beside the stored"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts."""
        return {**super().to_dict(), "reread": list(self.reread), "converged": self.converged}

    def __str__(self) -> str:
        return "\n".join([self._headline(), *self._table(), *self._remarks()])

    def _headline(self) -> str:
        error = "" if self.error is None else f", error {self.error:.2g}"
        goal = "" if self.tolerance is None else f" (tolerance {self.tolerance:g})"
        return (
            f"precise BN ({self.variance}): {len(self.layers)} layers from {self.samples} samples in "
            f"{self.batches} batches{self.weighed}, {self.seconds:.1f} s{error}{goal}"
        )

    def _table(self) -> list[str]:
        width = max(len("layer"), *map(len, self.layers)) if self.layers else 0
        lines = [f"{'layer':<{width}}  {'mean shift':>10}  {'rms':>8}  {'var ratio':>15}  {'error':>8}"]
        for name, change in self.layers.items():
            errors = [e for e in (change.error_mean, change.error_var) if e is not None]
            ratio = f"{change.var_ratio_min:.3g} .. {change.var_ratio_max:.3g}"
            error = f"{max(errors):.2g}" if errors else "-"
            lines.append(
                f"{name:<{width}}  {change.mean_shift:>10.3g}  {change.mean_shift_rms:>8.3g}  {ratio:>15}  {error:>8}"
                + ("  re-read" if change.reread else "")
            )
        return lines

    def _remarks(self) -> list[str]:
        kept = {"never called": self.uncalled, "frozen": self.frozen, "without running statistics": self.untracked}
        lines = [f"kept, {reason}: {', '.join(names)}" for reason, names in kept.items() if names]
        for name, change in self.layers.items():
            if change.collapsed:
                more = ", ..." if change.collapsed[_SHOWN:] else ""
                channels = ", ".join(map(str, change.collapsed[:_SHOWN])) + more
                lines.append(f"nearly constant on the data: {len(change.collapsed)} channels of {name} ({channels})")
        return lines + [f"warning: {text}" for text in self.warnings]


def layer_changes(
    statistics: Mapping[str, LayerStatistics],
    stored: Stored,
    own: Mapping[str, NewStatistics],
    new: Mapping[str, NewStatistics],
) -> dict[str, LayerChange]:
    """Compares what layers get with what they held, and with what the data alone would have given them."""
    return {name: _change(*stored[name], statistics[name].eps, own[name].var, each) for name, each in new.items()}


def _change(mean: Tensor, var: Tensor, eps: float, own: Tensor, new: NewStatistics) -> LayerChange:
    shifts = (new.mean - mean).abs() / (var + eps).sqrt()
    ratios = (new.var + eps) / (var + eps)
    error = new.error if new.error is not None and math.isfinite(new.error.worst) else None
    return LayerChange(
        values=int(new.values),
        mean_shift=shifts.max().item(),
        mean_shift_rms=torch.linalg.vector_norm(shifts).item() / len(shifts) ** 0.5,
        var_ratio_min=ratios.min().item(),
        var_ratio_max=ratios.max().item(),
        error_mean=None if error is None else error.mean,
        error_var=None if error is None else error.var,
        reread=new.reread,
        collapsed=collapsed_channels(var + eps, own + eps),
    )


def doubts(run: Pass, new: Mapping[str, NewStatistics], limits: Limits, data: Any) -> tuple[str, ...]:
    """Reasons not to trust that a tolerance was reached; none without a tolerance."""
    if limits.tolerance is None:
        return ()
    errors = {name: stats.error for name, stats in new.items() if stats.error is not None}
    found = []
    worst = max(errors, key=lambda name: errors[name].worst, default=None)
    if not run.stopped_early and worst is not None and errors[worst].worst > limits.tolerance:
        found.append(
            f"tolerance={limits.tolerance:g} was not reached: {run.samples} samples leave an estimated error of "
            f"{errors[worst].worst:.2g} (BN layer {worst!r}); give more data or a larger tolerance"
        )
    if run.batches < MIN_GROUPS:
        found.append(
            f"only {run.batches} batches: their spread says little about the error; "
            f"use at least {MIN_GROUPS}, if need be of fewer samples"
        )
    if run.labels.is_sorted:
        found.append(
            "batches come sorted by class, so the estimated error says nothing about classes still to come, and the "
            "pass did not stop early; shuffle the data"
        )
    elif errors and (correlation := median(error.correlation for error in errors.values())) > _NOTABLE_CORRELATION:
        found.append(
            f"neighbouring batches resemble each other (correlation {correlation:.2f}), as in sorted data; "
            "the estimated error allows for that, but shuffled data would need fewer samples"
        )
    if run.stopped_early and not run.labels.seen and is_read_in_stored_order(data):
        found.append(
            "the loader reads its data set in stored order and stopped before the end; if that order is not random, "
            "the statistics are not those of the whole set: use shuffle=True"
        )
    return tuple(found)
