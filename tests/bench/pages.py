"""Puts what was measured into the pages of docs/ that explain it: a table between two marks, and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- measured -->", "<!-- end -->"


def put_table(page: Path, source: Path, table: str, what: str) -> None:
    """Replace the measured part of a page.

    Args:
        page: a page with the marks `BEGIN` and `END`.
        source: the JSON file that `results.record` has written, whose newest entry says where and when.
        table: the measured part, in Markdown.
        what: what the figures are, such as the number of seeds.
    """
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    newest: dict[str, Any] = list(json.loads(source.read_text(encoding="utf-8")).values())[-1]
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    setting = f"{what}; {newest['machine']}; {versions}; {newest['date']}."
    page.write_text(f"{before}{BEGIN}\n{table}\n\n{setting}\n{END}{after}", encoding="utf-8")


def figure_style() -> Any:
    """pyplot without a window, writing SVG files that are the same for the same figures."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "bnfinetune", "svg.fonttype": "none", "savefig.facecolor": "white"})
    mpl.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    import matplotlib.pyplot as plt

    return plt
