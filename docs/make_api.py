"""Write the pages on the public names of Python, which mkdocstrings fills in: `python docs/make_api.py`."""

from __future__ import annotations

from pathlib import Path

import bnfinetune

FOLDER = Path(__file__).parent / "reference" / "api"

# Each page: its title, what it is about, and the rooms whose names it has; the first page that fits a name has it.
PAGES = {
    "policies": (
        "Policies",
        "What BN layers do, for any layers, and its exact undo. [BN policies](../../policies.md) tells it in order.",
        ("bn.policy", "bn.layers"),
    ),
    "statistics": (
        "Population statistics",
        "Statistics computed from data, merged and shrunk. [How](../../precise_bn.md).",
        ("bn.statistics",),
    ),
    "folding": (
        "Folding",
        "Frozen BN computed inside convolutions. [Which of three](../../parameterisation.md).",
        ("bn.folding", "bn.absorb"),
    ),
    "networks": (
        "Converting and averaging networks",
        "Other norms in the place of BN, and averages of networks with statistics of their own.",
        ("bn.convert", "bn.average"),
    ),
    "adaptation": ("Adaptation", "To images without labels. [What it gains](../../domain_shift.md).", ("bn.adapt",)),
    "doctor": ("The doctor", "Pitfalls found and explained. [All checks](../../checks/README.md).", ("diagnose",)),
    "training": (
        "Training and comparing",
        "Whole runs, and the parts of them that serve any loop. [Keys](../keys.md) of a recipe, and "
        "[comparing](../../compare.md).",
        ("training", "comparison"),
    ),
    "neighbours": (
        "Other trainers and formats",
        "Connections to what is not torch and timm alone.",
        ("integrations", "export", ""),
    ),
}


def pages() -> dict[Path, str]:
    """Every page that has a name, by its file."""
    placed = {name: _page_of(home.removeprefix("bnfinetune.")) for name, home in bnfinetune._HOMES.items()}
    return {
        FOLDER / f"{page}.md": _page(title, about, [name for name in placed if placed[name] == page])
        for page, (title, about, _) in PAGES.items()
        if page in placed.values()
    }


def _page_of(home: str) -> str:
    return next(page for page, (_, _, rooms) in PAGES.items() if any(_lies_in(home, room) for room in rooms))


def _lies_in(home: str, room: str) -> bool:
    return not room or home == room or home.startswith(f"{room}.")


def _page(title: str, about: str, names: list[str]) -> str:
    blocks = "\n".join(_block(name) for name in sorted(names, key=str.lower))
    opening = f"{about} All are names of `bnfinetune`, here `bnf`."
    return f"# {title}\n\n<!-- Written by docs/make_api.py. -->\n\n{opening}\n\n{blocks}"


def _block(name: str) -> str:
    return f"::: {bnfinetune._HOMES[name]}.{name}\n    options:\n      heading: bnf.{name}\n      toc_label: {name}\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
