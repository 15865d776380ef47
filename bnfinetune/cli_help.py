"""What `help` and `--help` print: tasks, verbs, and every key of a recipe as the schema describes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnfinetune.cli_tasks import TASKS
from bnfinetune.cli_verbs import Verb
from bnfinetune.errors import RecipeError
from bnfinetune.recipe_files import recipe_settings, shipped_recipes
from bnfinetune.recipe_hints import meant_key
from bnfinetune.recipe_keys import RecipeKey, RecipeSection, find_key, recipe_schema

_WIDTH = 100
_INTRODUCTION = """\
A recipe holds what differs from the defaults below. `bnfinetune recipes` lists the shipped ones; your own is a YAML \
file, which may build on another with `base: NAME`.

Overrides are key=value with YAML values: optim.lr=1e-3, data.val_split=null, bn.layers='["layer3.*", "layer4.*"]'. \
bn is one section, or a list of such for different layers: bn='[{...}, {...}]' bn.0.affine=frozen.
"""


def print_all(verbs: Mapping[str, Verb]) -> None:
    """Print common tasks, verbs, then each section of a recipe with its keys, values, defaults and meaning."""
    console = _console()
    console.print(Text("Usage: bnfinetune [VERB] key=value ...\n", style="bold"))
    console.print("Fine-tune timm backbones with BatchNorm handled right.\n")
    console.print(Text("common tasks", style="bold"))
    for task, line in TASKS.items():
        console.print(Text(f"  {task}"), Text(f"      {line}", style="cyan"), sep="\n", soft_wrap=True)
    console.print(Text("\nrecipes and overrides", style="bold"), Text(_INTRODUCTION.rstrip()), sep="\n")
    for title, lookup in (("\nverbs", False), ("\nverbs that look something up", True)):
        table = _table(title)
        for name, verb in verbs.items():
            if verb.looks_up == lookup:
                table.add_row(Text(name, style="cyan"), Text(verb.summary))
        console.print(table)
    console.print(Text("\nbnfinetune help VERB or KEY says more about one.\n"))
    sections = list(recipe_schema().walk())
    width = max(len(key.leaf) for section in sections for key in section.keys)
    for section in sections:
        console.print(_section_table(section, width, console.width), Text())


def print_about(name: str, verbs: Mapping[str, Verb]) -> None:
    """Print all that a name stands for: a verb, a section, a key or a shipped recipe; a last part is enough of a key.

    Raises:
        RecipeError: It stands for nothing.
    """
    shipped, target = shipped_recipes(), find_key(name) if name else None
    keys = [target] if isinstance(target, RecipeKey) else [] if target else _keys_called(name)
    if name in verbs:
        print_verb(name, verbs[name])
    if isinstance(target, RecipeSection):
        width = max(len(key.leaf) for key in target.keys)
        console = _console()
        for section in target.walk():
            console.print(_section_table(section, width, console.width), Text())
    for key in keys:
        _print_key(key)
    if name in shipped:
        _console().print(Text(shipped[name].read_text(encoding="utf-8").rstrip()), soft_wrap=True)
    if name not in verbs and name not in shipped and not target and not keys:
        raise RecipeError(f"{name}: no such verb, key or recipe{_near(name, [*verbs, *shipped])}")


def print_verb(name: str, verb: Verb) -> None:
    """Print how one verb is called."""
    console = _console()
    console.print(Text(f"Usage: bnfinetune {name} {verb.usage}".rstrip() + "\n", style="bold"))
    console.print(Text(verb.help))
    if verb.options:
        table = _table("\noptions")
        for option, meaning in verb.options.items():
            table.add_row(Text(f"{option}=", style="cyan"), Text(meaning))
        console.print(table)
    if verb.takes_overrides:
        console.print(Text("\nKeys of a recipe are listed by bnfinetune --help, and explained by bnfinetune help KEY."))


class _Console(Console):
    """A console that leaves a reader's early departure to `cli.main`; rich would end the program here."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _print_key(key: RecipeKey) -> None:
    console = _console()
    table = _table(key.path)
    table.add_column(width=len("default"))
    rows = {"meaning": key.help, "values": key.allowed, "default": key.default, "recipes": _recipes_that_set(key.path)}
    for name, value in rows.items():
        table.add_row(Text(name), Text(value, style="green" if name == "default" else ""))
    console.print(table, Text())


def values_in_recipes(path: str) -> dict[str, list[Any]]:
    """The values that shipped recipes give a key, by recipe; several where they have several sections of layers."""
    found = {
        name: [value for key, value in settings.items() if _without_positions(key) == path]
        for name, settings in _shipped_settings().items()
    }
    return {name: values for name, values in found.items() if values}


def _recipes_that_set(path: str) -> str:
    named = (f"{name} {' and '.join(map(json.dumps, values))}" for name, values in values_in_recipes(path).items())
    return ", ".join(named).replace('"', "") or "none sets it"


@cache
def _shipped_settings() -> dict[str, dict[str, Any]]:
    return {name: recipe_settings(name) for name in shipped_recipes()}


def _without_positions(key: str) -> str:
    return ".".join(part for part in key.split(".") if not part.isdigit())


def _keys_called(leaf: str) -> list[RecipeKey]:
    return [key for section in recipe_schema().walk() for key in section.keys if key.leaf == leaf]


def _near(name: str, others: Sequence[str]) -> str:
    """`; did you mean a, b?` for the nearest few names."""
    parts = [part for section in recipe_schema().walk() for part in section.parts]
    by_leaf = {part.leaf: part.path for part in reversed(parts)}
    leaf = name.rpartition(".")[2]
    near = [
        *([meant] if (meant := meant_key(name)) else []),
        *get_close_matches(name, others, n=3),
        *get_close_matches(name, [part.path for part in parts], n=3),
        *(by_leaf[found] for found in get_close_matches(leaf, by_leaf, n=3, cutoff=0.7)),
    ]
    return f"; did you mean {', '.join(list(dict.fromkeys(near))[:5])}?" if near else "; bnfinetune --help lists all"


def _section_table(section: RecipeSection, key_width: int, console_width: int) -> Table:
    """A section's keys; where the terminal is too narrow for four columns, values and default stand with the help."""
    table = _table(f"{section.path or 'recipe'}: {section.help}")
    if console_width < _WIDTH:
        table.add_column(width=key_width)
        for key in section.keys:
            values = Text.assemble(key.allowed, "; default ", (key.default, "green"))
            table.add_row(Text(key.leaf, style="cyan"), Text.assemble(values, "\n", key.help))
        return table
    table.show_header = True
    for name, width in (("key", key_width), ("values", 24), ("default", 14), ("", None)):
        table.add_column(name, width=width)
    for key in section.keys:
        table.add_row(Text(key.leaf, style="cyan"), Text(key.allowed), Text(key.default, style="green"), Text(key.help))
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", box=None, show_header=False, pad_edge=False)


def _console() -> Console:
    """The terminal at a legible width; a pipe or file gets plain text of a fixed width."""
    console = _Console(highlight=False)
    console.width = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
    return console
