"""What `--help` prints: the verbs, and every key of a recipe as the schema describes it."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnfinetune.cli_verbs import Verb
from bnfinetune.recipe_keys import RecipeSection, recipe_schema

_WIDTH = 100
_INTRODUCTION = """\
Fine-tune timm backbones with BatchNorm handled right.

A recipe holds what differs from the defaults below. `bnfinetune recipes` lists the shipped ones;
your own is a YAML file, which may build on another with `base: NAME`. Overrides are key=value with
YAML values: optim.lr=1e-3, data.val_split=null, bn.layers='["layer3.*", "layer4.*"]'.
bn is one section, or a list of such for different layers: bn='[{...}, {...}]' bn.0.affine=frozen.
"""


def print_all(verbs: Mapping[str, Verb]) -> None:
    """Print usage, verbs, then each section of a recipe with its keys, values, defaults and meaning."""
    console = _console()
    console.print(Text("Usage: bnfinetune [VERB] key=value ...\n", style="bold"))
    console.print(Text(_INTRODUCTION))
    table = _table("verbs")
    for name, verb in verbs.items():
        table.add_row(Text(name, style="cyan"), Text(verb.summary))
    console.print(table, Text("\nbnfinetune VERB --help says more about one.\n"))
    sections = list(recipe_schema().walk())
    width = max(len(key.leaf) for section in sections for key in section.keys)
    for section in sections:
        console.print(_section_table(section, width), Text())


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
        console.print(Text("\nThe keys of a recipe are listed by bnfinetune --help."))


class _Console(Console):
    """A console that leaves a reader's early departure to `cli.main`; rich would end the program here."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _section_table(section: RecipeSection, key_width: int) -> Table:
    table = _table(f"{section.path or 'recipe'}: {section.help}")
    for name, width in (("key", key_width), ("values", 24), ("default", 14), ("", None)):
        table.add_column(name, width=width)
    table.show_header = True
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
