"""The figures of a report as SVG text that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from markupsafe import Markup

from bnfinetune.diagnose.drift_report import BATCH_SIZES, SOUND_NOISE, DriftReport

INK = "#010203"  # stands for the page's text colour
BLUE, ORANGE, GREEN = "#4a8fd0", "#d9822b", "#4c9f70"  # legible on white and on near-black
WIDTH = 4.8  # inches; fits a phone with legible letters
_MARGINS = (0.7, 0.15, 0.5, 0.1)  # inches, left, right, bottom and top: room for numbers and one line of text
_COLUMNS = 96
_MOST_ROWS = 64


@contextmanager
def drawing(name: str, width: float, height: float, *, named: bool = False) -> Iterator[tuple[Any, Any, list[str]]]:
    """Lends a figure with one axis; its SVG is in the list after the block.

    Args:
        name: of the figure, one of its own on a page.
        width: in inches.
        height: in inches.
        named: whether the axes bear names that need room of their own, which takes as long to find as the drawing.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # ids must differ between the figures of a page, and not between runs
        "text.parse_math": False,  # a $ in a name from data is only a character
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    out: list[str] = []
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained" if named else None)
        axis = figure.subplots()
        if not named:
            left, right, bottom, top = _MARGINS
            figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
        yield figure, axis, out
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    out.append(_inline(text.getvalue(), name, width))


def _inline(svg: str, name: str, inches: float) -> str:
    """The svg element alone, scaling with the page, hidden from screen readers, which get the caption's text."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    style = f"max-width: {7 * inches:.4g}rem; min-width: {4.5 * inches:.4g}rem"  # letters stay legible on a phone
    body = body.replace("<svg ", f'<svg aria-hidden="true" focusable="false" style="{style}" ', 1)
    return body.replace(INK, "currentColor")


def heat_map(report: DriftReport) -> Markup:
    """Layers from input to output, each with its channels from the furthest off to the nearest."""
    layers = list(report.layers.values())
    if len(layers) > _MOST_ROWS:
        kept = {layer.name for layer in report.ranked()[:_MOST_ROWS]}
        layers = [layer for layer in layers if layer.name in kept]
    rows = [_sorted_distances(layer.mean_shift, layer.log_var_ratio) for layer in layers]
    with drawing("heat", 8.4, 1.1 + 0.2 * len(rows), named=True) as (figure, axis, out):
        image = axis.imshow(np.array(rows), aspect="auto", cmap="cividis", vmin=0, vmax=2, interpolation="nearest")
        axis.set_yticks(range(len(layers)), [short(layer.name) for layer in layers], fontsize=8)
        axis.set_xticks([0, _COLUMNS / 2, _COLUMNS - 1], ["furthest channel", "middle", "nearest"], fontsize=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axis, shrink=min(1.0, 8 / max(len(rows), 8)), pad=0.01, extend="max")
        bar.set_label("standard deviations off", fontsize=8)
        bar.outline.set_visible(False)
    return Markup(out[0])


def _sorted_distances(shift: Sequence[float], log_ratio: Sequence[float]) -> np.ndarray[Any, Any]:
    distance = np.hypot(np.array(shift), np.exp(np.clip(np.array(log_ratio) / 2, -20, 20)) - 1)
    ordered = np.sort(np.nan_to_num(distance, nan=1e9, posinf=1e9))[::-1]
    place = np.minimum(np.arange(_COLUMNS) * len(ordered) // _COLUMNS, len(ordered) - 1)
    return np.asarray(ordered[place])


def noise_curve(report: DriftReport) -> Markup:
    """Noise of a batch's statistics against its size: the worst layer, the middle one, and measured batches."""
    every = np.array([layer.noise for layer in report.layers.values()])
    with drawing("noise", WIDTH, 3.0) as (_, axis, out):
        axis.plot(BATCH_SIZES, report.noise, color=ORANGE, marker="o", markersize=4, label="worst layer, predicted")
        axis.plot(BATCH_SIZES, np.median(every, axis=0), color=BLUE, marker="s", markersize=4, label="middle layer")
        if report.batch_noise:
            sizes, values = zip(*report.batch_noise.items(), strict=True)
            axis.plot(sizes, values, color=INK, marker="x", linestyle="none", label="worst layer, measured batches")
        axis.axhline(SOUND_NOISE, color=INK, linewidth=0.8, linestyle=":")
        axis.text(BATCH_SIZES[-1], SOUND_NOISE, "sound below", va="bottom", ha="right", fontsize=8)
        axis.set(xscale="log", yscale="log", xlabel="images per statistic", ylabel="noise, standard deviations")
        axis.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.legend(fontsize=8)
    return Markup(out[0])


def regimes(report: DriftReport) -> Markup:
    """Accuracy, or distance of the predictions, under the three kinds of statistics."""
    kinds = {"running": report.running, "each batch's": report.batch, "re-estimated": report.reestimated}
    labelled = report.running.accuracy is not None
    values = [100 * (each.accuracy or 0.0) if labelled else each.distance for each in kinds.values()]
    with drawing("regimes", WIDTH, 1.6, named=True) as (_, axis, out):
        bars = axis.barh(list(kinds)[::-1], values[::-1], color=[GREEN, BLUE, ORANGE])
        axis.bar_label(bars, fmt="%.1f %%" if labelled else "%.3f", padding=3, fontsize=8)
        axis.set(xlabel="accuracy, %" if labelled else "distance from re-estimated predictions")
        axis.set(xlim=(0, 115) if labelled else (0, None))
        if labelled:
            axis.set_xticks(range(0, 101, 20))
        else:
            axis.margins(x=0.15)
        axis.tick_params(axis="y", length=0)
    return Markup(out[0])


def causes(report: DriftReport) -> Markup:
    """What each stage recovers when it alone normalises by the data."""
    names = list(report.stages)[::-1]
    values = [report.stages[name] for name in names]
    what = "loss" if report.running.loss is not None else "distance"
    with drawing("causes", WIDTH, 0.9 + 0.28 * len(names), named=True) as (_, axis, out):
        colours = [GREEN if value > 0 else ORANGE for value in values]
        bars = axis.barh([short(name) or "(the model)" for name in names], values, color=colours)
        axis.bar_label(bars, fmt="%+.2f", padding=3, fontsize=8)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set(xlabel=f"{what} recovered by this stage alone")
        axis.margins(x=0.15)
        axis.tick_params(axis="y", length=0)
    return Markup(out[0])


def curves(
    history: Sequence[Mapping[str, Any]],
    keys: Mapping[str, str],
    label: str,
    name: str,
    *,
    percent: bool = False,
    best: int | None = None,
) -> Markup:
    """Values of a run's history over its updates.

    Args:
        history: records with `update` and some of the keys.
        keys: names of the two lines by key of the records.
        label: what the values are.
        name: of the figure, one of its own on a page.
        percent: whether the values are shares.
        best: the update to mark as the best.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    styles = ((BLUE, "o"), (ORANGE, "s"))
    with drawing(name, WIDTH, 2.8) as (_, axis, out):
        for (key, title), (colour, marker) in zip(keys.items(), styles, strict=True):
            known = [record for record in history if record.get(key) is not None]
            updates, values = [r["update"] for r in known], [r[key] for r in known]
            axis.plot(updates, values, label=title, color=colour, marker=marker, markersize=3)
        if best is not None:
            axis.axvline(best, color=INK, linewidth=0.8, linestyle=":", label="best network")
        axis.set(xlabel="optimizer updates", ylabel=label)
        axis.set_ylim(bottom=None if percent else 0)
        axis.set_xlim(left=min(0, *axis.get_xlim()))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if percent:
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol="%"))
        axis.legend(fontsize=8)
    return Markup(out[0])


def confusion(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> Markup:
    """The confusion matrix, rows as shares of the true class's images; names up to 40 classes, counts up to 20."""
    table = np.array(counts, dtype=float)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = min(1.6 + 0.32 * len(class_names), 9.0)
    with drawing("confusion", side, side, named=True) as (_, axis, out):
        axis.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        if len(class_names) <= 40:
            labels = [short(name, 20) for name in class_names]
            upright = 0 if max(map(len, labels), default=0) <= 3 else 90
            axis.set_xticks(range(len(labels)), labels, rotation=upright, fontsize=8)
            axis.set_yticks(range(len(labels)), labels, fontsize=8)
        if len(class_names) <= 20:
            for row, column in zip(*table.nonzero(), strict=True):
                colour = "#101418" if shares[row, column] > 0.5 else "#ffffff"
                text = f"{table[row, column]:.0f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        axis.set(xlabel="predicted", ylabel="true")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return Markup(out[0])


def short(name: str, most: int = 34) -> str:
    """A name that fits beside a figure, without characters that XML cannot hold."""
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
    return clean if len(clean) <= most else f"{clean[: most // 2 - 1]}…{clean[-(most // 2) :]}"
