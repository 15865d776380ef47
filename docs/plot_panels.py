"""The parts that plots of docs/ are made of, and how each is drawn: curves, heat maps and bars, in one style.

Figures are as wide as a phone shows legibly, on white, so that they read on dark pages too. Whatever is compared has
one colour and one mark in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WIDTH = 5.4  # inches
_LETTERS = 64  # of a legend, in one line

BLUE, SKY, GREEN, ORANGE, RED, PINK = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"
BROWN, GREY, BLACK = "#8c6d46", "#9a9a9a", "#222222"
# Okabe and Ito's colours, told apart by most colour-blind eyes, and a mark besides.
LOOKS = {
    "as in training": (ORANGE, "^"),
    "running averages": (RED, "o"),
    "running averages, momentum 0.01": (PINK, "v"),
    "precise-BN": (GREEN, "s"),
    "frozen": (BLUE, "D"),
    "full: BN live": (RED, "o"),
    "freeze_bn: BN fixed": (BLUE, "D"),
    "W, g and b apart": (BLUE, "D"),
    "absorbed": (PINK, "v"),
    "no norm": (GREY, "o"),
    "training BN": (RED, "o"),
    "eval mode": (ORANGE, "^"),
    "mmengine": (BROWN, "P"),
    "folded": (BLUE, "D"),
    "timm freeze": (BLACK, "X"),
    "torchvision": (PINK, "v"),
}


@dataclass(frozen=True)
class Point:
    """One mark of a curve: where it is, and from where to where seeds reach."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curves:
    """Lines over an axis of ratios.

    Attributes:
        x: what the horizontal axis shows.
        y: what the vertical axis shows.
        curves: marks by name, the names being those of `LOOKS`.
        title: above the panel.
        percent: whether the vertical axis ends at 100.
        bottom: where the vertical axis begins.
    """

    x: str
    y: str
    curves: Mapping[str, Sequence[Point]]
    title: str = ""
    percent: bool = True
    bottom: float = 0.0

    def height(self, width: float) -> float:
        return 0.78 * width if width < WIDTH else 0.52 * width

    def draw(self, axis: Any) -> None:
        for name, points in self.curves.items():
            colour, mark = LOOKS[name]
            xs, ys = [point.x for point in points], [point.y for point in points]
            reach = [[point.y - point.low for point in points], [point.high - point.y for point in points]]
            line = "--" if name == "precise-BN" else "-"  # it often lies upon another
            axis.errorbar(
                xs, ys, reach, fmt=mark + line, color=colour, ms=5, lw=1.6, elinewidth=1, capsize=2, label=name
            )
        axis.set(xlabel=self.x, ylabel=self.y, title=self.title, xscale="log")
        axis.set_ylim(self.bottom, 102 - 0.02 * self.bottom if self.percent else None)
        places = sorted({point.x for points in self.curves.values() for point in points})
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()


@dataclass(frozen=True)
class HeatMap:
    """A table whose cells are coloured by their number.

    Attributes:
        rows: names from above.
        columns: names from the left.
        cells: a number or nothing for each row and column.
        against: a column; cells are then coloured by what they gain or lose against it, in the same row.
        x: what the columns are.
        title: above the table.
        rules: rows that a line is drawn above.
        low: where the colours begin; they end at 100.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[float | None]]
    against: str | None = None
    x: str = ""
    title: str = ""
    rules: Sequence[int] = ()
    low: float = 0.0

    def height(self, width: float) -> float:
        return 0.3 * len(self.rows) + (0.75 if self.x or self.title else 0.45)

    def draw(self, axis: Any) -> None:
        from matplotlib.colors import Normalize, TwoSlopeNorm

        shades = [[math.nan if shade is None else shade for shade in row] for row in self._shades()]
        known = [abs(shade) for row in shades for shade in row if not math.isnan(shade)]
        scale = Normalize(self.low, 100) if self.against is None else TwoSlopeNorm(0, -max(known), max(known))
        image = axis.imshow(shades, "YlGnBu" if self.against is None else "RdBu", norm=scale, aspect="auto")
        for row, values in enumerate(self.cells):
            for column, value in enumerate(values):
                dark = sum(image.cmap(scale(shades[row][column]))[:3]) < 1.5 if value is not None else False
                told = "" if value is None else f"{value:.0f}"
                axis.text(column, row, told, ha="center", va="center", color="white" if dark else BLACK)
        for rule in self.rules:
            axis.axhline(rule - 0.5, color=BLACK, lw=1)
        axis.set_title(self.title)
        axis.set_xlabel(self.x, labelpad=7)
        axis.set_xticks(range(len(self.columns)), self.columns)
        axis.set_yticks(range(len(self.rows)), self.rows)
        axis.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
        axis.xaxis.set_label_position("top")
        axis.spines[:].set_visible(False)
        axis.grid(visible=False)

    def _shades(self) -> list[list[float | None]]:
        if self.against is None:
            return [list(row) for row in self.cells]
        base = self.columns.index(self.against)
        return [[None if cell is None else cell - (row[base] or 0) for cell in row] for row in self.cells]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from zero, from above; a thin line shows from where to where the middle half of rounds reaches.

    Attributes:
        x: what the axis shows.
        bars: `Point.y` is the length.
        title: above the panel.
        reference: where a line is drawn down all bars.
    """

    x: str
    bars: Mapping[str, Point]
    title: str = ""
    reference: float | None = None

    def height(self, width: float) -> float:
        return 0.2 * len(self.bars) + 0.6

    def draw(self, axis: Any) -> None:
        for place, (name, bar) in enumerate(self.bars.items()):
            base, _, more = name.partition(", ")
            colour, _ = LOOKS[base]
            axis.barh(place, bar.y, color=colour, alpha=0.55 if more else 1, height=0.75)
            axis.plot([bar.low, bar.high], [place, place], color=BLACK, lw=1)
        if self.reference is not None:
            axis.axvline(self.reference, color=BLACK, lw=0.8, ls=":")
        axis.set(xlabel=self.x, title=self.title, xlim=(0, None))
        axis.set_yticks(range(len(self.bars)), list(self.bars))
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)


Panel = Curves | HeatMap | Bars


@dataclass(frozen=True)
class Plot:
    """Panels side by side.

    Attributes:
        panels: row by row.
        columns: panels in a row.
        note: a line below them, such as what the thin lines are.
    """

    panels: Sequence[Panel]
    columns: int = 1
    note: str = ""

    def content(self) -> dict[str, Any]:
        """All that is drawn, as JSON can hold it."""
        return asdict(self)

    def save(self, path: Path, title: str, source: str, identifier: str) -> None:
        """Write the SVG, with where it is from in its metadata."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        with mpl.rc_context({**_STYLE, "svg.hashsalt": path.stem}):
            rows = [self.panels[start : start + self.columns] for start in range(0, len(self.panels), self.columns)]
            heights = [max(panel.height(WIDTH / self.columns) for panel in row) for row in rows]
            size = (WIDTH, sum(heights) + 0.35 + 0.2 * self.note.count("\n"))
            figure = Figure(figsize=size, layout="constrained")
            figure.get_layout_engine().set(h_pad=0.07, w_pad=0.06)
            axes = figure.subplots(len(rows), self.columns, squeeze=False, height_ratios=heights)
            for axis, panel in zip(axes.flat, self.panels, strict=False):
                panel.draw(axis)
            for axis in axes.flat[len(self.panels) :]:
                axis.set_visible(False)
            self._without_repetition(axes)
            _legend(figure, axes)
            if self.note:
                figure.supxlabel(self.note, fontsize=9, color="#555555")
            told = {"Title": title, "Source": source, "Identifier": identifier, "Date": None, "Creator": None}
            figure.savefig(path, metadata=told)

    def _without_repetition(self, axes: Any) -> None:
        """Of bars, names stand on the left alone and what the axis shows below alone."""
        if all(isinstance(panel, Bars) for panel in self.panels):
            for axis in axes[:, 1:].flat:
                axis.set_yticklabels([])
            for axis in axes[:-1].flat:
                axis.set_xlabel("")


def _legend(figure: Any, axes: Any) -> None:
    """One for all panels, above them."""
    found = {}
    for axis in axes.flat:
        handles, names = axis.get_legend_handles_labels()
        found |= dict(zip(names, handles, strict=True))
    if found:
        letters = sum(len(name) + 8 for name in found)
        columns = len(found) if letters <= _LETTERS else 2
        figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns)


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
}
