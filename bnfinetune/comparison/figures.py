"""The figures of a comparison's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bnfinetune.comparison.paired import Difference
from bnfinetune.diagnose.figures import BLUE, GREEN, INK, ORANGE, WIDTH, drawing, short

_STYLES = (  # legible on white and on near-black; markers tell apart those who do not see colours
    *((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), ("#b07cc6", "D"), ("#c2566e", "v"), ("#8a8f3c", "P"), ("#3fa7a7", "X")),
    ("#9a7b5b", "*"),
)
MOST_LINES = len(_STYLES)
"""Cells that a figure of lines can tell apart."""


def _percent(axis: Any, which: str) -> None:
    getattr(axis, f"{which}axis").set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def _rows(axis: Any, names: Sequence[str], label: str) -> None:
    """A row for each name, from the bottom up."""
    axis.set_yticks(range(len(names)), [short(name, 26) for name in names], fontsize=8)
    axis.set(xlabel=label, ylim=(-0.6, len(names) - 0.4))
    axis.tick_params(axis="y", length=0)


def scores(values: Mapping[str, Sequence[float]], label: str, *, shares: bool) -> Markup:
    """One row per cell: a dot for each seed, a line at their mean."""
    names = list(values)[::-1]
    with drawing("scores", WIDTH, 0.9 + 0.3 * len(names), named=True) as (_, axis, out):
        for place, name in enumerate(names):
            seeds = values[name]
            axis.plot(seeds, [place] * len(seeds), "o", color=BLUE, alpha=0.6, markersize=5, markeredgewidth=0)
            middle = sum(seeds) / len(seeds)
            axis.plot([middle, middle], [place - 0.3, place + 0.3], color=ORANGE, linewidth=2)
        _rows(axis, names, label)
        axis.margins(x=0.1)
        if shares:
            _percent(axis, "x")
    return Markup(out[0])


def differences(found: Mapping[str, Difference]) -> Markup:
    """How far each cell is from the winner, with its interval; those without a bound have a dot alone."""
    names = list(found)[::-1]
    with drawing("differences", WIDTH, 0.9 + 0.3 * len(names), named=True) as (_, axis, out):
        for place, name in enumerate(names):
            each = found[name]
            colour = ORANGE if each.is_behind else BLUE
            axis.plot([100 * each.low, 100 * each.high], [place, place], color=colour, linewidth=2)
            axis.plot([100 * each.mean], [place], "o", color=colour, markersize=5)
        axis.axvline(0, color=INK, linewidth=0.8)
        _rows(axis, names, "points from the best, 95 % interval")
    return Markup(out[0])


def lines(
    found: Mapping[str, Sequence[tuple[float, float]]], name: str, axes: tuple[str, str], *, shares: bool, log: bool
) -> Markup:
    """Lines of (x, y), by what they are of; `axes` names the two, and `log` spreads x by its ratios."""
    with drawing(name, WIDTH, 3.0) as (_, axis, out):
        for (title, points), (colour, marker) in zip(found.items(), _STYLES, strict=False):
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=short(title, 26))
        if log:
            places = sorted({x for points in found.values() for x, _ in points})
            axis.set_xscale("log")
            axis.set_xticks(places, [f"{place:g}" for place in places], fontsize=8)
            axis.minorticks_off()
        axis.set(xlabel=axes[0], ylabel=axes[1])
        if shares:
            _percent(axis, "y")
        axis.legend(fontsize=8)
    return Markup(out[0])
