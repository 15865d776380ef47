"""A finished training run as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from bnfinetune.diagnose import figures
from bnfinetune.diagnose.drift_report import FITS, DriftReport
from bnfinetune.diagnose.finding import Finding
from bnfinetune.diagnose.page import Drawing, Grid, Page, Part, Picture
from bnfinetune.diagnose.report import checks, drift_parts

_PAIRS = 10
SHARES = {"top1": "top-1", "top5": "top-5", "map": "mAP", "macro_f1": "macro F1", "micro_f1": "micro F1"}
"""Metrics that are shares, with the names that people give them."""
_NUMBERS = {"ece": "calibration error", "loss": "loss"}


@dataclass(frozen=True, kw_only=True)
class RunStory:
    """What is told of a run; only `title`, `before` and `after` must be known.

    Attributes:
        title: such as the names of recipe and network.
        before: metrics by split before training: `images`, `top1` or, of several labels per image, `map`, and others.
        after: the same of the best network; the last split is the one that counts.
        history: one record per evaluation, the first from before training, with `update` and any of `train_loss`,
            `loss`, `top1`, `map`, `macro_f1`, `bn_drift` (stored statistics against the data's own) and `bn_moved`
            (against those at the start).
        best_update: the update whose network is the best.
        numbers: further figures to show at the top.
        confusion: counts by true and predicted class, on the last split of `after`.
        class_names: names of the classes, in order.
        per_class: accuracy or, of several labels per image, average precision by class name; None without images.
        thresholds: of several labels per image: the probability from which on each class is predicted.
        mistakes: the images that the network gets most wrong.
        drift: statistics of the best network against images.
        findings: of the checks at the start.
        settings: what the run was made with, by name.
        recipe: text of the whole recipe.
        command: what runs it again.
    """

    title: str
    before: Mapping[str, Mapping[str, float]]
    after: Mapping[str, Mapping[str, float]]
    history: Sequence[Mapping[str, Any]] = ()
    best_update: int | None = None
    numbers: Mapping[str, str] | None = None
    confusion: Sequence[Sequence[int]] = ()
    class_names: Sequence[str] = ()
    per_class: Mapping[str, float | None] | None = None
    thresholds: Sequence[float] = ()
    mistakes: Sequence[Picture] = ()
    drift: DriftReport | None = None
    findings: Sequence[Finding] = ()
    settings: Mapping[str, str] | None = None
    recipe: str = ""
    command: str = ""

    @property
    def split(self) -> str:
        """The split that counts."""
        return list(self.after)[-1]

    @property
    def main(self) -> str:
        """The metric that counts most."""
        return "map" if "map" in self.after[self.split] else "top1"


def run_page(story: RunStory) -> Page:
    """The page of a run: result, curves, confusion, mistakes, statistics, checks, settings.

    Examples:
        >>> run_page(RunStory(title="mine", before=before, after=after)).write("report.html")
    """
    before, after = story.before[story.split][story.main], story.after[story.split][story.main]
    verdict = f"{after:.1%} of the {story.split} images are classified right; before training, {before:.1%} were"
    if story.main == "map":
        verdict = f"mean average precision is {after:.1%} on the {story.split} images; before training, {before:.1%}"
    parts = [
        _result(story),
        *_history(story),
        *_confusion(story),
        *_labels(story),
        *_mistakes(story),
        *checks(story.findings),
        *_statistics(story),
        *_settings(story),
    ]
    return Page(story.title, verdict, _numbers(story), tuple(parts))


def _numbers(story: RunStory) -> dict[str, str]:
    last = story.after[story.split]
    numbers = {SHARES[story.main]: f"{last[story.main]:.1%}"}
    images = int(last.get("images", 0))
    if images and "top1" in last:
        low, high = wilson(last["top1"], images)
        numbers[f"95% interval, {images:,} images"] = f"{low:.1%} to {high:.1%}"
    if "macro_f1" in last:
        numbers["macro F1"] = f"{last['macro_f1']:.1%}"
    return numbers | dict(story.numbers or {})


def wilson(share: float, images: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); SciPy's own is the same, and takes a second to import."""
    z = NormalDist().inv_cdf(0.975)
    centre, scale = share + z**2 / (2 * images), 1 + z**2 / images
    reach = z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    return max((centre - reach) / scale, 0.0), min((centre + reach) / scale, 1.0)


def _result(story: RunStory) -> Part:
    texts = []
    if story.split == "validation":
        texts.append("The validation images have also chosen the best network, so these numbers flatter it a little.")
    first = story.after[story.split]
    keys = {key: name for key, name in (SHARES | _NUMBERS).items() if key in first}
    rows = tuple(
        (f"{split}, {when}", *(_shown(key, values[key]) for key in keys))
        for split in story.after
        for when, values in (("before", story.before[split]), ("after", story.after[split]))
    )
    return Part("Result", tuple(texts), tables=(Grid("Metrics by split", ("", *keys.values()), rows),))


def _shown(key: str, value: float) -> str:
    return f"{value:.1%}" if key in SHARES else f"{value:.3f}"


def _history(story: RunStory) -> list[Part]:
    if not story.history:
        return []
    history, best = story.history, story.best_update
    loss = figures.curves(history, {"train_loss": "training", "loss": "validation"}, "loss", "losses", best=best)
    lines = {key: SHARES[key] for key in (story.main, "macro_f1")}
    shares = figures.curves(history, lines, "validation", "accuracies", percent=True, best=best)
    at = "" if best is None else f" The best network is that of update {best}."
    return [
        Part(
            "Over the run",
            figures=(
                Drawing(loss, f"Loss over the run; of training, the mean since the evaluation before.{at}"),
                Drawing(
                    shares, f"Measured on the validation images over the run, from before the first update on.{at}"
                ),
            ),
            tables=(_records(history),),
        )
    ]


def _records(history: Sequence[Mapping[str, Any]]) -> Grid:
    """The curves in numbers."""
    columns = {"train_loss": "training loss", "loss": "validation loss"}
    columns |= {key: SHARES[key] for key in ("top1", "map", "macro_f1")}
    columns |= {"bn_drift": "BN drift", "bn_moved": "BN moved"}
    known = {key: name for key, name in columns.items() if any(record.get(key) is not None for record in history)}
    rows = tuple(
        (
            str(record["update"]),
            *("" if record.get(key) is None else _shown(key, record[key]) for key in known),
        )
        for record in history
    )
    return Grid("The same in numbers", ("update", *known.values()), rows, folded=True)


def _confusion(story: RunStory) -> list[Part]:
    if not story.confusion:
        return []
    pairs = _worst_pairs(story)
    most = f" Most often, {pairs[0][0]} is taken for {pairs[0][1]}." if pairs else " No image is classified wrong."
    caption = f"Rows are the true classes of the {story.split} images, columns what they are taken for.{most}"
    tables = []
    if pairs:
        tables.append(Grid("Most confused", ("class", "taken for", "images", "of the class"), pairs, (1,)))
    if story.per_class:
        shares = tuple((name, f"{share:.1%}") for name, share in _worst_first(story.per_class))
        tables.append(Grid("Accuracy by class, the worst first", ("class", "accuracy"), shares, folded=True))
    drawing = Drawing(figures.confusion(story.confusion, story.class_names), caption)
    return [Part("Confusion", figures=(drawing,), tables=tuple(tables))]


def _labels(story: RunStory) -> list[Part]:
    """What stands for the confusion matrix where an image has several labels, of which none is taken for another."""
    if not story.thresholds or not story.per_class:
        return []
    cuts = dict(zip(story.per_class, story.thresholds, strict=True))
    rows = tuple((name, f"{share:.1%}", f"{cuts[name]:.3f}") for name, share in _worst_first(story.per_class))
    text = "A class is predicted from its threshold on, which has the best F1 on the validation images."
    columns = ("class", "average precision", "threshold")
    return [Part("Classes", (text,), tables=(Grid("Average precision by class, the worst first", columns, rows),))]


def _worst_first(shares: Mapping[str, float | None]) -> list[tuple[str, float]]:
    known = [(name, share) for name, share in shares.items() if share is not None]
    return sorted(known, key=lambda item: item[1])


def _worst_pairs(story: RunStory) -> tuple[tuple[str, ...], ...]:
    counts, names = story.confusion, story.class_names
    wrong = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if count and i != j]
    worst = sorted(wrong, key=lambda each: (-each[0], each[1], each[2]))[:_PAIRS]
    return tuple((names[i], names[j], str(count), f"{count / sum(counts[i]):.0%}") for count, i, j in worst)


def _mistakes(story: RunStory) -> list[Part]:
    if not story.mistakes:
        return []
    label = "true class" if story.main == "top1" else "most doubtful label"
    text = (
        f"The {story.split} images whose {label} the network finds least likely, as it sees them. "
        "Wrong labels gather here."
    )
    return [Part("Most wrong", (text,), pictures=tuple(story.mistakes))]


def _statistics(story: RunStory) -> list[Part]:
    if story.drift is None:
        return []
    text = (
        f"BN layers of the best network, measured on {story.drift.images} training images prepared as for evaluation. "
        f"{story.drift.verdict}"
    )
    return [Part("BatchNorm statistics", (text,), figures=_drift_curve(story)), *drift_parts(story.drift)]


def _drift_curve(story: RunStory) -> tuple[Drawing, ...]:
    if not any(record.get("bn_drift") is not None for record in story.history):
        return ()
    lines = {"bn_drift": "stored against the data's own", "bn_moved": "stored against the start"}
    drawn = figures.curves(story.history, lines, "standard deviations", "drifts", best=story.best_update)
    caption = (
        "Statistics of the worst layer over the run. The first line is high where the running averages lag behind the "
        f"weights, or where fixed ones no longer fit them; up to {FITS} they fit. The second tells how far they came."
    )
    return (Drawing(drawn, caption),)


def _settings(story: RunStory) -> list[Part]:
    rows = tuple((story.settings or {}).items())
    tables = (Grid("The run", ("", ""), rows, (1,)),) if rows else ()
    document = ("The whole recipe", story.recipe) if story.recipe else None
    if not (tables or document):
        return []
    return [Part("How it was made", command=story.command, document=document, tables=tables)]
