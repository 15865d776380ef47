"""Which shipped recipe fits a situation, with the reasons in numbers."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from bnfinetune.diagnose.drift_report import BATCH_SIZES, CLUSTERED, SOUND_NOISE, DriftReport
from bnfinetune.diagnose.readout import Readout

TINY_SET = 100
"""Training images below which the head is fitted first, so that few updates do not distort what is pretrained."""

MEASURED = 1000
"""Training images up to which recipes were compared on photographs: docs/transfer.md."""

RUINED = 0.2
"""Share of images that statistics of their own must put right for the stored ones to be called ruined; those of another
domain were worth half of that to a readout."""

RIVALS = ("freeze_bn", "lp_ft")
"""Recipes that were ahead of the recommended one on some tasks of docs/transfer.md."""

FEW_IMAGES, ENOUGH_IMAGES = 8, 16
"""Images per statistic below which a network without statistics of its own needs fixed ones, and from which it does not
(Wu & Johnson 2021, figure 6)."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the choice of a recipe depends on.

    Attributes:
        batch_size: images per process and forward in training.
        ranks: processes that train together.
        training_images: size of the training set; None if unknown.
        smallest_sound_batch: images that a statistic needs; None if above 256.
        untrained: whether the statistics are those of construction, or damaged.
        ruined: whether the images' own statistics put so much right that the stored ones cannot belong to the weights.
        sorted_batches: whether batches hold images that are like each other, as in a set sorted by class.
        labelled: whether the data has labels to train on.
    """

    batch_size: int
    ranks: int = 1
    training_images: int | None = None
    smallest_sound_batch: int | None = 8
    untrained: bool = False
    ruined: bool = False
    sorted_batches: bool = False
    labelled: bool = True

    @classmethod
    def of(
        cls, report: DriftReport, *, batch_size: int | None = None, ranks: int = 1, readout: Readout | None = None
    ) -> Situation:
        """The situation that a report describes, to be trained with another batch size or on more processes.

        Args:
            report: of `inspect_bn`.
            batch_size: images per process and forward; by default those that were inspected.
            ranks: processes.
            readout: what statistics of the images are worth to a new head; without one, what they are worth to the
                network's own tells, where it knows the classes.
        """
        return cls(
            batch_size=batch_size or report.batch_size,
            ranks=ranks,
            training_images=report.training_images,
            smallest_sound_batch=report.smallest_sound_batch,
            sorted_batches=report.clustered,
            untrained=any(layer.damaged for layer in report.layers.values()) or report.untouched,
            ruined=_ruined(report) if readout is None else tells_ruin(readout),
            labelled=readout is not None or report.running.loss is not None,
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

    @property
    def comparison(self) -> str | None:
        """The command line that finds out how it does beside its rivals; None where it has none."""
        if self.recipe not in {"precise_then_freeze", *RIVALS}:
            return None
        recipes = ", ".join(dict.fromkeys([self.recipe, *RIVALS]))
        return shlex.join(["bnfinetune", "compare", f"recipe=[{recipes}]", *self.overrides])

    def __str__(self) -> str:
        surer = [] if self.comparison is None else ["or measure what is best on these images:", self.comparison]
        reasons = (f"- {reason}" for reason in self.reasons)
        return "\n".join([f"recommended: recipe={self.recipe}", *reasons, self.command, *surer])


def tells_ruin(readout: Readout) -> bool:
    """Whether statistics of the images put so much right that the stored ones cannot belong to the weights."""
    return readout.helps and readout.gain > RUINED


def _ruined(report: DriftReport) -> bool:
    """Whether re-estimation raises the accuracy by more than `RUINED` and two standard errors; not without labels."""
    before, after = report.running.accuracy, report.reestimated.accuracy
    if before is None or after is None:
        return False
    variance = (before * (1 - before) + after * (1 - after)) / report.images
    return after - before > max(RUINED, 2 * math.sqrt(variance))


def recommend(situation: Situation) -> Recommendation:
    """Chooses the shipped recipe that fits a situation.

    A pretrained network's weights were trained with its statistics: on small sets of photographs, drawings and cartoons
    fixed ones were ahead of live ones at batches of 2 and of 16 alike, and best where they had first gone towards those
    of the images, as far as features gain by it (docs/transfer.md). A network without statistics needs images for
    them: fixed ones from 8 per statistic down, live ones from 16 on (Wu & Johnson 2021, figure 6). With very few
    training images the head is fitted first (Kumar et al. 2022).

    Args:
        situation: what was measured and what is planned.
    """
    reasons: list[str] = []
    overrides = [f"train.batch_size={situation.batch_size}"]
    if not situation.labelled:
        reasons.append("the data has no labels, so only statistics can follow it")
        return Recommendation("adabn", tuple(overrides), tuple(reasons), situation.ranks)
    recipe = _with_labels(situation, reasons, overrides)
    return Recommendation(recipe, tuple(overrides), tuple(reasons), situation.ranks)


def _with_labels(situation: Situation, reasons: list[str], overrides: list[str]) -> str:
    images = situation.training_images
    anew = situation.untrained or situation.ruined
    _tell_statistics(situation, reasons)
    if situation.sorted_batches:
        reasons.append(
            f"batches scatter more than {CLUSTERED} times as much as random ones, as in a set sorted by class: shuffle "
            "if that is possible; fixed statistics do not see the batch, and few parameters forget less of the classes "
            "before"
        )
        return _with_statistics("bn_only", overrides, anew)
    if situation.untrained:
        return _untrained(situation, reasons)
    if images is not None and images < TINY_SET:
        reasons.append(f"{images} training images are fewer than {TINY_SET}: the head is fitted before anything learns")
        return _with_statistics("lp_ft", overrides, anew)
    if images is not None and images > MEASURED:
        reasons.append(
            f"with more than {MEASURED} training images recipes were not compared on photographs: try recipe=full too, "
            "and keep the better on validation"
        )
    return "precise_then_freeze"


def _with_statistics(recipe: str, overrides: list[str], anew: bool) -> str:
    """A recipe with fixed statistics, which are computed first where the stored ones are of no use."""
    if anew:
        overrides += ["recalibrate.at=[start]", "recalibrate.prior=auto"]
    return recipe


def _tell_statistics(situation: Situation, reasons: list[str]) -> None:
    if situation.untrained:
        reasons.append("the stored statistics are those of construction, or damaged: they must come from the data")
    elif situation.ruined:
        reasons.append(
            f"statistics of these images put more than {RUINED:.0%} of them right: those that are stored cannot belong "
            "to the weights, and are computed anew first"
        )
    else:
        reasons.append(
            "the weights were trained with the stored statistics: these go towards those of the images only as far as "
            "features gain by it, and then stay fixed"
        )


def _untrained(situation: Situation, reasons: list[str]) -> str:
    needed, joined = situation.needed, situation.batch_size * situation.ranks
    if situation.batch_size >= needed:
        reasons.append(
            f"{situation.batch_size} images per statistic are enough: {needed} are needed for a noise of {SOUND_NOISE} "
            "standard deviations or less"
        )
        return "full"
    reasons.append(f"{situation.batch_size} images per process are too few for a statistic: {needed} are needed")
    if joined >= needed:
        reasons.append(f"{situation.ranks} processes together have {joined}")
        return "sync_bn"
    reasons.append("so the statistics are estimated anew before training and then stay fixed")
    return "precise_then_freeze"
