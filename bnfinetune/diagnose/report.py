"""What `inspect_bn` measured, as a page."""

from __future__ import annotations

from collections.abc import Sequence

from bnfinetune.diagnose import figures
from bnfinetune.diagnose.drift_report import BATCH_SIZES, SOUND_NOISE, DriftReport, LayerReport, Regime, remarks
from bnfinetune.diagnose.finding import Finding
from bnfinetune.diagnose.page import Drawing, Grid, Page, Part
from bnfinetune.diagnose.readout import Readout
from bnfinetune.diagnose.recommend import Recommendation

_SHOWN_LAYERS = 12


def drift_page(
    report: DriftReport,
    *,
    title: str = "BatchNorm statistics against data",
    findings: Sequence[Finding] = (),
    recommendation: Recommendation | None = None,
    readout: Readout | None = None,
) -> Page:
    """What `inspect_bn` measured, as a page.

    Args:
        report: the measurements.
        title: such as the name of the checkpoint and of the data.
        findings: of `check_bn` or `watch_bn`.
        recommendation: which recipe fits.
        readout: what statistics of the data would be worth to a new head.

    Examples:
        >>> drift_page(bnf.inspect_bn(model, loader)).write("report.html")
    """
    advice = [] if recommendation is None else [_advice(recommendation)]
    sections = [*advice, *checks(findings), *drift_parts(report)]
    verdict = report.verdict if readout is None else f"{readout.verdict} {report.verdict}"
    return Page(title, verdict, _numbers(report), tuple(sections))


def drift_parts(report: DriftReport) -> list[Part]:
    """The sections of a page that show what `inspect_bn` measured."""
    return [_cost(report), *_causes(report), _map(report), _layers(report), _noise(report), _terms()]


def checks(findings: Sequence[Finding]) -> list[Part]:
    """The section of a page that shows findings; none where there are none."""
    return [Part("Checks", findings=tuple(findings))] if findings else []


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
        points=(*recommendation.reasons, *_surer(recommendation)),
        command=recommendation.command,
    )


def _surer(recommendation: Recommendation) -> list[str]:
    found = recommendation.comparison
    return [] if found is None else [f"what is best on these images is measured by: {found}"]


def _cost(report: DriftReport) -> Part:
    kinds = {
        "running statistics": report.running,
        f"each batch's own ({report.batch_size} images)": report.batch,
        "re-estimated from these images": report.reestimated,
    }
    header: tuple[str, ...] = ("normalised by", "accuracy", "loss", "distance")
    rows = [(name, *_marks(each), f"{each.distance:.3f}") for name, each in kinds.items()]
    if report.running.loss is None:
        header = (header[0], header[-1])
    table = Grid("The same images under three kinds of statistics", header, tuple(rows))
    caption = "What the model makes of the same images before and after re-estimation; the numbers are in the table."
    return Part("Before and after re-estimation", figures=(Drawing(figures.regimes(report), caption),), tables=(table,))


def _marks(regime: Regime) -> tuple[str, ...]:
    """What only images with labels tell."""
    return () if regime.accuracy is None or regime.loss is None else (f"{regime.accuracy:.1%}", f"{regime.loss:.3f}")


def _causes(report: DriftReport) -> list[Part]:
    best = max(report.stages, key=lambda name: report.stages[name], default="")
    if report.stages.get(best, 0.0) <= 0:
        return []  # none is better off with the data's statistics
    caption = (
        f"Each stage alone normalises by the data; {best or 'the model'} recovers most, {report.stages[best]:+.2f}."
    )
    text = "A stage that recovers much holds the fault, or stands right behind it and makes up for it."
    left = (f"{report.left_out} stages and layers were not tried for want of time.",) if report.left_out else ()
    return [Part("Causes", texts=(text, *left), figures=(Drawing(figures.causes(report), caption),))]


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
        f"{mean_kl:.3f}",
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
    texts: tuple[str, ...] = ()
    if report.clustered:
        texts = (
            f"The batches as they came scatter {report.clustering:.1f} times as much as random ones would: they hold "
            "images that are like each other, as in a set sorted by class. Shuffle them.",
        )
    return Part(
        "Noise against batch size", texts, figures=(Drawing(figures.noise_curve(report), caption),), tables=(table,)
    )


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
