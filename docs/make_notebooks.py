"""Write a notebook of every tutorial, for a hosted notebook or one's own: `python docs/make_notebooks.py`."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOCS = Path(__file__).parent
FOLDER = DOCS / "notebooks"

INSTALL = "%pip install --quiet bnfinetune"
ABOUT = "<!-- Written by docs/make_notebooks.py from docs/tutorials/{name}.md. -->"
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

_RUNS = re.compile(r"^```(python|bash)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def notebooks() -> dict[Path, str]:
    """Every notebook, by its file."""
    return {
        FOLDER / f"{page.stem}.ipynb": notebook(page.stem, page.read_text(encoding="utf-8"))
        for page in sorted((DOCS / "tutorials").glob("*.md"))
    }


def notebook(name: str, page: str) -> str:
    """A tutorial's markdown as the text of a notebook: what runs as code, the rest as it is."""
    cells = [new_markdown_cell(ABOUT.format(name=name)), new_code_cell(INSTALL, metadata={"tags": ["install"]})]
    end = 0
    for block in _RUNS.finditer(page):
        cells += [*_prose(page[end : block.start()]), new_code_cell(_code(*block.groups()))]
        end = block.end()
    cells += _prose(page[end:])
    for number, cell in enumerate(cells):
        cell["id"] = f"{name}-{number}"  # by default drawn at random
    made = new_notebook(cells=cells, metadata=KERNEL)
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def _prose(text: str) -> list[NotebookNode]:
    return [new_markdown_cell(text.strip())] if text.strip() else []


def _code(language: str, block: str) -> str:
    return ("%%bash\n" if language == "bash" else "") + block.rstrip()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in notebooks().items():
        path.write_text(text, encoding="utf-8")
