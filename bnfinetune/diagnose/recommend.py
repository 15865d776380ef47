"""Which shipped recipe fits a situation, with the reasons in numbers."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from bnfinetune.diagnose.drift_report import BATCH_SIZES, CLUSTERED, FITS, FOREIGN, SOUND_NOISE, DriftReport

TINY_SET = 100
"""Training images below which a network has too few to fit more than scales, shifts and the head."""

FEW_IMAGES, ENOUGH_IMAGES = 8, 16
"""Images per statistic below which fixed statistics win, and from which live ones do (Wu & Johnson 2021, figure 6)."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the choice of a recipe depends on.

    Attributes:
        batch_size: images per process and forward in training.
        ranks: processes that train together.
        training_images: size of the training set; None if unknown.
        drift: drift of the worst layer, in standard deviations.
        smallest_sound_batch: images that a statistic needs; None if above 256.
        untrained: whether the statistics are those of construction, or damaged.
        sorted_batches: whether batches hold images that are like each other, as in a set sorted by class.
        labelled: whether the data has labels to train on.
    """

    batch_size: int
    ranks: int = 1
    training_images: int | None = None
    drift: float = 0.0
    smallest_sound_batch: int | None = 8
    untrained: bool = False
    sorted_batches: bool = False
    labelled: bool = True

    @classmethod
    def of(cls, report: DriftReport, *, batch_size: int | None = None, ranks: int = 1) -> Situation:
        """The situation that a report describes, to be trained with another batch size or on more processes."""
        return cls(
            batch_size=batch_size or report.batch_size,
            ranks=ranks,
            training_images=report.training_images,
            drift=report.drift,
            smallest_sound_batch=report.smallest_sound_batch,
            sorted_batches=report.clustered,
            untrained=any(layer.damaged for layer in report.layers.values()) or report.untouched,
            labelled=report.running.loss is not None,
        )

    @property
    def needed(self) -> int:
        """Images per statistic that live statistics need here."""
        return max(FEW_IMAGES, min(self.smallest_sound_batch or BATCH_SIZES[-1], ENOUGH_IMAGES))


@dataclass(frozen=True)
class Recommendation:
    """A shipped recipe, what to change in it, and why.

    Attributes:
        recipe: its name.
        overrides: keys that the situation asks for.
        reasons: one sentence each, with the numbers that decided.
        processes: how many processes to launch.
    """

    recipe: str
    overrides: tuple[str, ...]
    reasons: tuple[str, ...]
    processes: int = 1

    @property
    def command(self) -> str:
        """The command line to run it."""
        words = shlex.join(["-m", "bnfinetune", f"recipe={self.recipe}", *self.overrides])
        launcher = "python" if self.processes == 1 else f"torchrun --nproc_per_node {self.processes}"
        return f"{launcher} {words}"

    def __str__(self) -> str:
        return "\n".join(
            [f"recommended: recipe={self.recipe}", *(f"- {reason}" for reason in self.reasons), self.command]
        )


def recommend(situation: Situation) -> Recommendation:
    """Chooses the shipped recipe that fits a situation.

    Live statistics need images: below 8 per statistic fixed ones win, from 16 on live ones do (Wu & Johnson 2021,
    figure 6). Fixed statistics must be the data's own, so drift asks for an estimate first. Few training images ask
    for few parameters.

    Args:
        situation: what was measured and what is planned.
    """
    reasons: list[str] = []
    overrides = [f"train.batch_size={situation.batch_size}"]
    recipe = _without_labels(situation, reasons) or _with_labels(situation, reasons, overrides)
    return Recommendation(recipe, tuple(overrides), tuple(reasons), situation.ranks)


def _without_labels(situation: Situation, reasons: list[str]) -> str | None:
    if situation.labelled:
        return None
    reasons.append("the data has no labels, so only statistics can follow it")
    return "adabn"


def _with_labels(situation: Situation, reasons: list[str], overrides: list[str]) -> str:
    images = situation.training_images
    foreign = situation.untrained or situation.drift > FOREIGN
    _tell_drift(situation, reasons)
    if images is not None and images < TINY_SET:
        reasons.append(
            f"{images} training images are fewer than {TINY_SET}: scales, shifts and the head are enough to learn"
        )
        return _few_parameters(overrides, foreign)
    if situation.sorted_batches:
        reasons.append(
            f"batches scatter more than {CLUSTERED} times as much as random ones, as in a set sorted by class: shuffle "
            "if that is possible; fixed statistics do not see the batch, and few parameters forget less of the classes "
            "before"
        )
        return _few_parameters(overrides, foreign)
    if situation.batch_size >= situation.needed:
        reasons.append(
            f"{situation.batch_size} images per statistic are enough: {situation.needed} are needed for a noise of "
            f"{SOUND_NOISE} standard deviations or less"
        )
        return "full"
    return _small_batch(situation, reasons, foreign)


def _few_parameters(overrides: list[str], foreign: bool) -> str:
    """Scales, shifts and the head, behind statistics that fit."""
    if foreign:
        overrides.append("recalibrate.at=[start]")
    return "bn_only"


def _tell_drift(situation: Situation, reasons: list[str]) -> None:
    if situation.untrained:
        reasons.append("the stored statistics are those of construction, or damaged: they must come from the data")
    elif situation.drift > FOREIGN:
        reasons.append(
            f"the worst layer is off by {situation.drift:.2g} standard deviations, more than {FOREIGN}: foreign"
        )
    elif situation.drift > FITS:
        reasons.append(
            f"the worst layer is off by {situation.drift:.2g} standard deviations, which is not foreign ({FOREIGN}): "
            "training makes up for it"
        )
    else:
        reasons.append(f"the stored statistics fit: drift {situation.drift:.2g}, at most {FITS} standard deviations")


def _small_batch(situation: Situation, reasons: list[str], foreign: bool) -> str:
    joined = situation.batch_size * situation.ranks
    reasons.append(
        f"{situation.batch_size} images per process are too few for a statistic: {situation.needed} are needed"
    )
    if joined >= situation.needed and situation.ranks > 1:
        reasons.append(f"{situation.ranks} processes together have {joined}")
        return "sync_bn"
    if foreign:
        reasons.append("so the statistics are estimated anew before training and then stay fixed")
        return "precise_then_freeze"
    reasons.append("so the stored ones stay fixed, while weight and bias learn")
    return "freeze_stats"
