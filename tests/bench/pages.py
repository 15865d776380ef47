"""Puts what was measured into the pages of docs/ that explain it: tables between two marks each, and the plots."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def put_table(page: Path, source: Path, table: str, what: str) -> None:
    """Replace a measured part of a page.

    Args:
        page: a page with the marks `<!-- begin NAME -->` and `<!-- end NAME -->`, NAME being that of `source`.
        source: the file NAME.json that `results.record` has written, whose newest entry says where and when.
        table: the measured part, in Markdown.
        what: what the figures are, such as the number of seeds.
    """
    begin, end = f"<!-- begin {source.stem} -->", f"<!-- end {source.stem} -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    newest: dict[str, Any] = list(json.loads(source.read_text(encoding="utf-8")).values())[-1]
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    setting = f"{what}; {newest['machine']}; {versions}; {newest['date']}."
    page.write_text(f"{before}{begin}\n{table}\n\n{setting}\n{end}{after}", encoding="utf-8")


def draw_plots() -> None:
    """Draw those plots of docs/ anew whose records say something else now."""
    subprocess.run([sys.executable, str(DOCS / "make_plots.py")], check=True)
