"""What `inspect_bn` measured: per layer, per regime, per batch size, in numbers, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bnfinetune.bn.saved_report import SavedReport, plain

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

SOUND_NOISE = 0.25
"""Noise of a batch's statistics, in standard deviations, up to which a batch size is called sound."""

FITS, FOREIGN = 0.25, 0.75
"""Drift of the worst layer, in standard deviations, up to which statistics are those of the images, and from which they
are another domain's."""


CLUSTERED = 1.35
"""Scatter of the statistics of batches, as a multiple of that of random ones, from which they are no random ones."""


@dataclass(frozen=True)
class Regime:
    """What the model makes of the images under one kind of statistics.

    Attributes:
        accuracy: share of right classes; None without labels.
        loss: mean cross-entropy; None without labels.
        distance: mean total variation distance of the predicted distributions from those under re-estimated statistics.
    """

    accuracy: float | None
    loss: float | None
    distance: float


@dataclass(frozen=True)
class LayerReport:
    """One layer's stored statistics against the data's; tuples hold one number per channel.

    Attributes:
        name: qualified name.
        type: class without any policy.
        channels: how many.
        drift: distance of stored from measured statistics in standard deviations, root mean square over channels
            weighed by weight squared, without sampling noise; as training normalises, so that the layer is judged
            apart from those before it. None where stored statistics are not finite.
        drift_in_evaluation: the same as evaluation normalises, the faults of earlier layers included.
        mean_shift: (measured - stored mean) / stored standard deviation.
        log_var_ratio: log of measured over stored variance, each plus eps.
        symmetric_kl: KL divergence of the two Gaussians, both ways added.
        noise: expected distance of the statistics of a batch from the population's, for each of `BATCH_SIZES`.
        dead: channels that are constant on these images (measured variance below eps).
        starved: channels whose stored variance is below eps, so that eps decides their scale.
        muted: channels whose weight is below a thousandth of the layer's largest.
        damaged: channels with stored statistics, weight or bias that are not finite, or a variance below 0.
        momentum: weight of the newest batch in training; None is cumulative.
        batches: `num_batches_tracked`, the updates so far; None if not counted.
        leftover: weight (1 - momentum)^steps that the stored statistics would keep after the planned steps.
        loss_recovered: how much the loss falls if this layer alone normalises by the data (without labels: how much of
            the distance goes); None if not tried.
    """

    name: str
    type: str
    channels: int
    drift: float | None
    drift_in_evaluation: float | None
    mean_shift: tuple[float, ...]
    log_var_ratio: tuple[float, ...]
    symmetric_kl: tuple[float, ...]
    noise: tuple[float, ...]
    dead: tuple[int, ...]
    starved: tuple[int, ...]
    muted: tuple[int, ...]
    damaged: tuple[int, ...]
    momentum: float | None
    batches: int | None
    leftover: float | None
    loss_recovered: float | None = None

    @property
    def urgency(self) -> float:
        """The drift, and infinity where it cannot be told."""
        return math.inf if self.drift is None else self.drift


@dataclass(frozen=True)
class DriftReport(SavedReport):
    """The outcome of `inspect_bn`; print it, `save` it as JSON, or give it to `write_page`.

    Attributes:
        images: how many images were measured.
        batch_size: images per batch as the data came.
        layers: every layer with running statistics, by name.
        running: the model as it evaluates now.
        batch: normalised by the batches as they came.
        reestimated: with statistics taken of these images.
        batch_noise: measured distance of each batch's statistics from the population's, worst layer, by batch size.
        stages: what each stage's normalisation by the data takes off the loss (or the distance), by prefix.
        training_images: size of the training set, if known.
        untouched: whether all stored statistics are those of construction.
        left_out: stages and layers whose part was not measured for want of time.
    """

    images: int
    batch_size: int
    layers: dict[str, LayerReport]
    running: Regime
    batch: Regime
    reestimated: Regime
    batch_noise: dict[int, float]
    stages: dict[str, float]
    training_images: int | None = None
    untouched: bool = False
    left_out: int = 0

    def ranked(self) -> list[LayerReport]:
        """Layers, the furthest off first."""
        return sorted(self.layers.values(), key=lambda layer: -layer.urgency)

    @property
    def drift(self) -> float:
        """Drift of the worst layer."""
        return self.ranked()[0].urgency

    @property
    def gap(self) -> float:
        """What the stored statistics cost on these images: loss above that with re-estimated ones.

        Without labels, the distance of the predictions.
        """
        if self.running.loss is None or self.reestimated.loss is None:
            return self.running.distance
        return self.running.loss - self.reestimated.loss

    @property
    def noise(self) -> tuple[float, ...]:
        """Noise of the worst layer for each of `BATCH_SIZES`."""
        return tuple(max(column) for column in zip(*(layer.noise for layer in self.layers.values()), strict=True))

    @property
    def clustering(self) -> float | None:
        """Scatter of the batches as they came, joined or not, as a multiple of what batches of random images have.

        About 1 or a little less for shuffled data; above `CLUSTERED`, batches hold images that are like each other, as
        in a set sorted by class. None for fewer than 4 batches.
        """
        scatter = [noise * math.sqrt(size) / self.noise[0] for size, noise in self.batch_noise.items() if self.noise[0]]
        return max(scatter, default=None)

    @property
    def clustered(self) -> bool:
        """Whether batches hold images that are like each other."""
        return self.clustering is not None and self.clustering > CLUSTERED

    @property
    def smallest_sound_batch(self) -> int | None:
        """The smallest batch size at which every layer's statistics are within `SOUND_NOISE`; None if above 256."""
        return next((size for size, noise in zip(BATCH_SIZES, self.noise, strict=True) if noise <= SOUND_NOISE), None)

    @property
    def verdict(self) -> str:
        """One sentence on the whole."""
        worst = self.ranked()[0]
        damaged = [layer.name for layer in self.layers.values() if layer.damaged]
        if damaged:
            return f"Damaged: {_some(damaged)} {_hold(damaged)} statistics that are not finite."
        if self.drift <= FITS:
            return f"The stored statistics are those of such images: no layer is off by {FITS} standard deviations."
        apart = [layer for layer in self.layers.values() if layer.urgency > FITS]
        return (
            f"The stored statistics are not those of these images: {worst.name or 'the layer'} is off by "
            f"{worst.drift:.2g} standard deviations, {len(apart)} of {len(self.layers)} layers by more than {FITS}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts; what is not finite becomes None."""
        content = asdict(self) | {
            "verdict": self.verdict,
            "drift": self.drift,
            "gap": self.gap,
            "batch_sizes": BATCH_SIZES,
            "noise": self.noise,
            "smallest_sound_batch": self.smallest_sound_batch,
            "clustering": self.clustering,
            "ranked": [layer.name for layer in self.ranked()],
        }
        return plain(content, digits=6)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        width = max(len("layer"), *(len(name) for name in self.layers))
        head = f"{'layer':<{width}}  {'drift':>7}  {'in eval':>7}  {'noise@' + str(self.batch_size):>9}  remarks"
        rows = [self._row(layer, width) for layer in self.ranked()[:20]]
        more = [f"... and {len(self.layers) - 20} more"] if len(self.layers) > 20 else []
        regimes = [
            f"{name:<13} {_shown(each)}"
            for name, each in (("running", self.running), ("batch", self.batch), ("re-estimated", self.reestimated))
        ]
        sound = self.smallest_sound_batch
        least = f"smallest sound batch: {sound if sound is not None else 'above 256'} images"
        sorted_data = [f"batches scatter {self.clustering:.1f} times as much as random ones"] if self.clustered else []
        return "\n".join([self.verdict, *regimes, least, *sorted_data, head, *rows, *more])

    def _row(self, layer: LayerReport, width: int) -> str:
        noise = layer.noise[min(range(len(BATCH_SIZES)), key=lambda i: abs(BATCH_SIZES[i] - self.batch_size))]
        drift = "   -   " if layer.drift is None else f"{layer.drift:7.3f}"
        evaluated = "   -   " if layer.drift_in_evaluation is None else f"{layer.drift_in_evaluation:7.3f}"
        return f"{layer.name:<{width}}  {drift}  {evaluated}  {noise:9.3f}  {remarks(layer)}".rstrip()


def remarks(layer: LayerReport) -> str:
    """What else there is to say of a layer, in a few words."""
    counts = {"damaged": layer.damaged, "dead": layer.dead, "starved": layer.starved, "muted": layer.muted}
    texts = [f"{len(channels)} {word}" for word, channels in counts.items() if channels]
    if layer.leftover is not None and layer.leftover > 0.05:
        texts.append(f"keeps {layer.leftover:.0%} of its statistics")
    if layer.loss_recovered is not None and layer.loss_recovered > 0:
        texts.append(f"recovers {layer.loss_recovered:.3g}")
    return ", ".join(texts)


def _shown(regime: Regime) -> str:
    if regime.accuracy is None or regime.loss is None:
        return f"distance {regime.distance:.3f}"
    return f"accuracy {regime.accuracy:.1%}, loss {regime.loss:.3f}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _hold(names: Sequence[str]) -> str:
    return "holds" if len(names) == 1 else "hold"
