"""Reports as one self-contained page: no script, no request to any host, everything from data escaped."""

from __future__ import annotations

import base64
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bnfinetune.diagnose import figures
from bnfinetune.diagnose.drift_report import BATCH_SIZES, SOUND_NOISE, DriftReport, LayerReport, remarks
from bnfinetune.diagnose.finding import Finding
from bnfinetune.diagnose.recommend import Recommendation

_SHOWN_LAYERS = 12


@dataclass(frozen=True)
class Drawing:
    """A figure; the caption says in words what it shows, for those who cannot see it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Grid:
    """A table; the first column heads its rows, `words` are the columns that hold no numbers."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """An image, and what it is."""

    png: bytes
    alt: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Part:
    """A section of a page; what is empty is left out."""

    title: str
    texts: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    command: str = ""
    findings: tuple[Finding, ...] = ()
    figures: tuple[Drawing, ...] = ()
    tables: tuple[Grid, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower())


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    verdict: str
    numbers: Mapping[str, str] = field(default_factory=dict)
    sections: tuple[Part, ...] = ()

    @property
    def footer(self) -> str:
        return f"bnfinetune {importlib.metadata.version('bnfinetune')}"

    def html(self) -> str:
        """The page as text."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("bnfinetune.diagnose", "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
        )
        return environment.get_template("report.html.jinja").render(page=self)

    def write(self, path: str | Path) -> None:
        """Writes the page to a file."""
        Path(path).write_text(self.html(), encoding="utf-8")


def drift_page(
    report: DriftReport,
    *,
    title: str = "BatchNorm statistics against data",
    findings: Sequence[Finding] = (),
    recommendation: Recommendation | None = None,
) -> Page:
    """What `inspect_bn` measured, as a page.

    Args:
        report: the measurements.
        title: such as the name of the checkpoint and of the data.
        findings: of `check_bn` or `watch_bn`.
        recommendation: which recipe fits.

    Example:
        >>> drift_page(bnf.inspect_bn(model, loader)).write("report.html")
    """
    advice = [] if recommendation is None else [_advice(recommendation)]
    checks = [_checks(findings)] if findings else []
    sections = [
        *advice,
        *checks,
        _cost(report),
        *_causes(report),
        _map(report),
        _layers(report),
        _noise(report),
        _terms(),
    ]
    return Page(title, report.verdict, _numbers(report), tuple(sections))


def _numbers(report: DriftReport) -> dict[str, str]:
    sound = report.smallest_sound_batch
    numbers = {
        "worst layer, standard deviations off": "not finite"
        if report.ranked()[0].drift is None
        else f"{report.drift:.2f}",
        "smallest sound batch": "above 256" if sound is None else f"{sound} images",
        "images measured": str(report.images),
    }
    if report.running.accuracy is not None and report.reestimated.accuracy is not None:
        numbers["accuracy as it is"] = f"{report.running.accuracy:.1%}"
        numbers["accuracy, re-estimated"] = f"{report.reestimated.accuracy:.1%}"
    else:
        numbers["distance from re-estimated"] = f"{report.running.distance:.2f}"
    return numbers


def _advice(recommendation: Recommendation) -> Part:
    return Part(
        "Recommendation",
        texts=(f"The shipped recipe {recommendation.recipe} fits, because",),
        points=recommendation.reasons,
        command=recommendation.command,
    )


def _checks(findings: Sequence[Finding]) -> Part:
    return Part("Checks", findings=tuple(findings))


def _cost(report: DriftReport) -> Part:
    kinds = {
        "running statistics": report.running,
        f"each batch's own ({report.batch_size} images)": report.batch,
        "re-estimated from these images": report.reestimated,
    }
    rows = tuple(
        (
            name,
            "" if each.accuracy is None else f"{each.accuracy:.1%}",
            "" if each.loss is None else f"{each.loss:.3f}",
            f"{each.distance:.3f}",
        )
        for name, each in kinds.items()
    )
    table = Grid(
        "The same images under three kinds of statistics", ("normalised by", "accuracy", "loss", "distance"), rows
    )
    caption = "What the model makes of the same images before and after re-estimation; the numbers are in the table."
    return Part("Before and after re-estimation", figures=(Drawing(figures.regimes(report), caption),), tables=(table,))


def _causes(report: DriftReport) -> list[Part]:
    if not report.stages:
        return []
    best = max(report.stages, key=lambda name: report.stages[name])
    caption = (
        f"Each stage alone normalises by the data; {best or 'the model'} recovers most, {report.stages[best]:+.2f}."
    )
    text = "A stage that recovers much holds the fault, or stands right behind it and makes up for it."
    return [Part("Causes", texts=(text,), figures=(Drawing(figures.causes(report), caption),))]


def _map(report: DriftReport) -> Part:
    worst = report.ranked()[0]
    caption = (
        "Each row is a layer, from input to output; each cell a channel, coloured by the distance of its stored from "
        f"its measured statistics. The worst layer is {worst.name or 'the model'}; the table below ranks all."
    )
    return Part("Layers and channels", figures=(Drawing(figures.heat_map(report), caption),))


def _layers(report: DriftReport) -> Part:
    ranked = report.ranked()
    header = ("layer", "drift", "in evaluation", "worst channel", "mean KL", f"noise at {report.batch_size}", "remarks")
    column = min(range(len(BATCH_SIZES)), key=lambda i: abs(BATCH_SIZES[i] - report.batch_size))
    rows = tuple(_row(layer, column) for layer in ranked)
    tables = [Grid("The layers that are furthest off", header, rows[:_SHOWN_LAYERS], (6,))]
    if rows[_SHOWN_LAYERS:]:
        rest = rows[_SHOWN_LAYERS:]
        tables.append(Grid(f"The other {len(rest)} layers", header, rest, (6,), folded=True))
    return Part("Worst layers", tables=tuple(tables))


def _row(layer: LayerReport, column: int) -> tuple[str, ...]:
    shifts = [abs(shift) for shift in layer.mean_shift]
    worst = max(range(len(shifts)), key=shifts.__getitem__)
    mean_kl = sum(layer.symmetric_kl) / layer.channels
    return (
        layer.name or "(the model)",
        _number(layer.drift),
        _number(layer.drift_in_evaluation),
        f"{worst}: mean {layer.mean_shift[worst]:+.2f}",
        f"{mean_kl:.3g}",
        f"{layer.noise[column]:.3f}",
        remarks(layer),
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _noise(report: DriftReport) -> Part:
    sound = report.smallest_sound_batch
    least = "more than 256 images" if sound is None else f"{sound} images"
    caption = (
        f"The statistics of a batch are off from the population's by less than {SOUND_NOISE} standard deviations in "
        f"every layer from {least} on; noise falls with the root of the batch."
    )
    rows = tuple((str(size), f"{noise:.3f}") for size, noise in zip(BATCH_SIZES, report.noise, strict=True))
    table = Grid("Noise of the worst layer by batch size", ("images per statistic", "noise"), rows, folded=True)
    return Part("Noise against batch size", figures=(Drawing(figures.noise_curve(report), caption),), tables=(table,))


def _terms() -> Part:
    return Part(
        "Terms",
        points=(
            "Drift: Wasserstein distance of stored from measured mean and deviation, in stored standard deviations, "
            "root mean square over channels weighed by weight squared, less what sampling alone would give; seen as "
            "training normalises, so that a layer is not blamed for those before it.",
            "In evaluation: the same behind running statistics, with all that earlier layers pass on.",
            "KL: symmetric Kullback-Leibler divergence of the two Gaussians, averaged over channels.",
            "Distance: mean total variation distance of the predictions from those under re-estimated statistics.",
            "Dead: constant on these images. Starved: stored variance below eps. Muted: weight near 0.",
        ),
    )


def run_page(
    *,
    title: str,
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
    history: Sequence[Mapping[str, Any]] = (),
    confusion: Sequence[Sequence[int]] = (),
    class_names: Sequence[str] = (),
    per_class: Mapping[str, float] | None = None,
    mistakes: Sequence[Picture] = (),
    drift: DriftReport | None = None,
    findings: Sequence[Finding] = (),
) -> Page:
    """A finished training run as a page.

    Args:
        title: the run's name.
        before: metrics by split before training: `top1`, `loss` and others.
        after: the same after it.
        history: one record per evaluation with `update` and any of `train_loss`, `loss`, `top1`, `macro_f1`, `drift`.
        confusion: counts by true and predicted class, on the last split of `after`.
        class_names: names of the classes, in order.
        per_class: accuracy by class name.
        mistakes: the images that the model gets most wrong; `alt` says what they are and are taken for.
        drift: statistics of the trained model against the validation data.
        findings: of the checks at the start.
    """
    last = list(after)[-1]
    verdict = f"{last}: top-1 {before[last]['top1']:.1%} before, {after[last]['top1']:.1%} after"
    parts = [_metrics(before, after)]
    if history:
        parts.append(_history(history))
    if confusion:
        drawing = Drawing(figures.confusion(confusion, class_names), f"Share of each true class's images, {last}.")
        parts.append(Part("Confusion", figures=(drawing,), tables=_per_class(per_class)))
    if mistakes:
        parts.append(Part("Most wrong", pictures=tuple(mistakes)))
    if findings:
        parts.append(_checks(findings))
    if drift is not None:
        parts += [_cost(drift), _map(drift), _layers(drift), _noise(drift), _terms()]
    return Page(title, verdict, {}, tuple(parts))


def _metrics(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> Part:
    keys = [key for key in next(iter(after.values())) if isinstance(next(iter(after.values()))[key], float)]
    rows = tuple(
        (f"{split} {when}", *(f"{values[key]:.4g}" for key in keys))
        for split in after
        for when, values in (("before", before[split]), ("after", after[split]))
    )
    return Part("Result", tables=(Grid("Metrics by split", ("", *keys), rows),))


def _history(history: Sequence[Mapping[str, Any]]) -> Part:
    loss = figures.curves(history, {"train_loss": "training", "loss": "validation"}, "loss", "losses")
    shares = figures.curves(history, {"top1": "top-1", "macro_f1": "macro F1"}, "validation", "accuracies")
    drawings = [Drawing(loss, "Loss over the run."), Drawing(shares, "Validation accuracy over the run.")]
    if any(record.get("drift") is not None for record in history):
        drift = figures.curves(history, {"drift": "worst layer"}, "standard deviations", "drifts")
        drawings.append(Drawing(drift, "Drift of the running statistics over the run."))
    return Part("Over the run", figures=tuple(drawings))


def _per_class(per_class: Mapping[str, float] | None) -> tuple[Grid, ...]:
    if not per_class:
        return ()
    rows = tuple((name, f"{share:.1%}") for name, share in sorted(per_class.items(), key=lambda item: item[1]))
    return (Grid("Accuracy by class, the worst first", ("class", "accuracy"), rows, folded=True),)
