"""What is compared: cells, which are recipes with overrides. No torch, so that mistakes answer at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from bnfinetune.errors import RecipeError
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import dump_recipe, load_recipe
from bnfinetune.recipe_keys import takes_text
from bnfinetune.recipe_text import read_yaml

_OURS = {"run.dir": "out=", "run.seed": "seeds=", "train.resume": "the same command, which goes on"}


@dataclass(frozen=True)
class Cell:
    """One way to fine-tune, as it is compared with others.

    Attributes:
        name: What sets it apart, such as `freeze_bn, optim.lr=1e-4`.
        words: How it is written behind `bnfinetune`: `recipe=NAME key=value ...`.
        recipe: The whole of it.
    """

    name: str
    words: tuple[str, ...]
    recipe: Recipe

    @property
    def folder(self) -> str:
        """A name for files."""
        return re.sub(r"[^\w.=-]+", "-", self.name).strip("-.") or "cell"


def cells_of(recipe: str, overrides: Sequence[str]) -> list[Cell]:
    """The product of all values of all keys that are given as a list.

    Args:
        recipe: A name or path, or a list of such: `[freeze_bn, full]`.
        overrides: Words `key=value`; a list stands for several cells, but for keys that are lists themselves, where a
            list of lists does.

    Raises:
        RecipeError: A value does not fit its key, a key is the comparison's own, or there is one cell only.
    """
    axes = [[("recipe", name) for name in _names(recipe)]]
    for word in overrides:
        key, _, value = word.partition("=")
        if key in _OURS:
            raise RecipeError(f"{key} is what compare sets itself: use {_OURS[key]}")
        axes.append([(key, each) for each in _values(key, value)])
    varied = [number for number, axis in enumerate(axes) if len(axis) > 1]
    cells = []
    for chosen in product(*axes):
        words = [f"{key}={value}" for key, value in chosen]
        apart = [words[number] if number else chosen[0][1] for number in varied]  # a recipe goes by its bare name
        cells.append(_cell(", ".join(apart), words))
    return _several(cells)


def cells_in(path: str, overrides: Sequence[str]) -> list[Cell]:
    """Cells that a file names: a mapping of names to `{recipe: NAME, key: value, ...}`.

    Raises:
        RecipeError: It is no such file, or a value does not fit its key.
    """
    try:
        named = read_yaml(Path(path).read_text(encoding="utf-8"), path)
    except OSError as error:
        raise RecipeError(f"cells: {path} cannot be read ({error.strerror})") from error
    cells = []
    for name, settings in named.items():
        if not isinstance(settings, Mapping) or "recipe" not in settings:
            raise RecipeError(f"{path}: {name}: a cell is a mapping with a recipe, such as {{recipe: freeze_bn}}")
        words = [f"{key}={written(value)}" for key, value in settings.items()]
        cells.append(_cell(str(name), [*words, *overrides]))
    return _several(cells)


def _cell(name: str, words: Sequence[str]) -> Cell:
    recipe = next(word for word in words if word.startswith("recipe="))
    others = [word for word in words if word is not recipe]
    return Cell(name, (recipe, *others), load_recipe(recipe.removeprefix("recipe="), others))


def _several(cells: Sequence[Cell]) -> list[Cell]:
    """Those that differ, by names that differ."""
    if len({dump_recipe(cell.recipe.model_copy(update={"name": "any"})) for cell in cells}) < 2:
        raise RecipeError("there is one cell only: give a key several values, such as recipe='[freeze_bn, full]'")
    if len({cell.folder for cell in cells}) < len(cells):
        raise RecipeError("two cells have the same name: name them apart")
    return list(cells)


def _names(recipe: str) -> list[str]:
    return [_plain(item) for item in _items(recipe)] or [recipe]


def _values(key: str, value: str) -> list[str]:
    """The texts of the values that a key is given."""
    items = _items(value)
    if not items:
        return [value]
    only_text, text_list = takes_text(key)
    is_list = text_list or (not only_text and _fits(key, value))
    if is_list and not all(item.startswith("[") for item in items):
        return [value]
    return [_plain(item) if only_text else item for item in items]


def _fits(key: str, value: str) -> bool:
    """Whether a list is what a key takes as its value."""
    try:
        load_recipe({}, [f"{key}={value}"])
    except RecipeError:
        return False
    return True


def _items(value: str) -> list[str]:
    """The items of a YAML list as they are written; none of what is no list."""
    try:
        node = yaml.compose(value, yaml.BaseLoader) if value.startswith("[") else None
    except yaml.YAMLError:
        return []
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    return [value[item.start_mark.index : item.end_mark.index] for item in items]


def _plain(item: str) -> str:
    """A text without the quotes around it."""
    return str(yaml.load(item, yaml.BaseLoader))


def written(value: Any) -> str:
    """A value as an override writes it."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
