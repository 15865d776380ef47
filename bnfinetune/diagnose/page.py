"""A self-contained page: no script, no request to any host, everything from data escaped."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

from bnfinetune.diagnose.finding import Finding

_SIDE = 144  # pixels of a thumbnail


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
    """An image from data, what it is, and what else there is to say of it, a line each."""

    png: bytes
    title: str
    lines: tuple[str, ...] = ()

    @classmethod
    def of(cls, image: Image.Image, title: str, lines: tuple[str, ...] = ()) -> Picture:
        """A thumbnail of an image, which becomes small."""
        image.thumbnail((_SIDE, _SIDE))
        out = io.BytesIO()
        image.save(out, format="PNG", optimize=True)
        return cls(out.getvalue(), title, lines)

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Part:
    """A section of a page; what is empty is left out. A document is a name and a text, shown on request."""

    title: str
    texts: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    command: str = ""
    document: tuple[str, str] | None = None
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
