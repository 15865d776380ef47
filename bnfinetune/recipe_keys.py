"""Every key of a recipe in words, read from the schema: for `--help`, the documentation and error messages."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from bnfinetune.recipe import Recipe


@dataclass(frozen=True)
class RecipePart:
    """A key or a section: its dotted path (empty for the recipe itself) and what it is for."""

    path: str
    help: str

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class RecipeKey(RecipePart):
    """One key: the values it takes, in words and as choices where there are such, and its default as YAML."""

    allowed: str
    default: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class RecipeSection(RecipePart):
    """One section: its keys, and the sections inside it."""

    keys: tuple[RecipeKey, ...]
    sections: tuple[RecipeSection, ...]

    @property
    def parts(self) -> tuple[RecipePart, ...]:
        """What may stand below this section."""
        return (*self.keys, *self.sections)

    def walk(self) -> Iterator[RecipeSection]:
        """This section and every one inside it, in the order of the schema."""
        yield self
        for section in self.sections:
            yield from section.walk()


@cache
def recipe_schema() -> RecipeSection:
    """The whole recipe as one section."""
    schema = Recipe.model_json_schema()
    return _section("", schema, schema["$defs"])


def find_key(path: str) -> RecipeKey | RecipeSection | None:
    """The key or section at a dotted path (empty: the recipe); a place inside a list or a value counts as the whole."""
    here = recipe_schema()
    for part in _names(path):
        below = {section.leaf: section for section in here.sections}
        if part not in below:
            return next((key for key in here.keys if key.leaf == part), None)
        here = below[part]
    return here


def takes_text(path: str) -> tuple[bool, bool]:
    """Whether every value of a key but null is text, and whether it may be a list of texts."""
    key = find_key(path)
    options = key.allowed.split(" | ") if isinstance(key, RecipeKey) and not key.choices else []
    texts = [option for option in options if option.startswith("text")]
    lists = [option for option in options if option.startswith("list of text")]
    return bool(texts) and len(texts) + len(lists) == len([each for each in options if each != "null"]), bool(lists)


def nearest_key(path: str) -> str | None:
    """The dotted key that somebody who wrote `path` most likely meant."""
    known = [part for section in recipe_schema().walk() for part in section.parts]
    bare = ".".join(_names(path))
    leaf = bare.rpartition(".")[2]
    if same_leaf := [part.path for part in known if part.leaf == leaf]:
        return difflib.get_close_matches(bare, same_leaf, n=1, cutoff=0.0)[0]
    if near := difflib.get_close_matches(bare, [part.path for part in known], n=1):
        return near[0]
    by_leaf = {part.leaf: part.path for part in reversed(known)}
    near = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)
    return by_leaf[near[0]] if near else None


def _names(path: str) -> list[str]:
    return [part for part in path.split(".") if part and not part.isdigit()]


def _section(path: str, schema: Mapping[str, Any], defs: Mapping[str, Any]) -> RecipeSection:
    keys, sections = [], []
    for name, field in schema["properties"].items():
        below = f"{path}.{name}" if path else name
        target = _section_schema(field, defs)
        if target is not None:
            sections.append(_section(below, target, defs))
        else:
            keys.append(
                RecipeKey(
                    path=below,
                    allowed=_allowed(field),
                    default=_default(field.get("default", {})),
                    help=field["description"],
                    choices=_choices(field),
                )
            )
    return RecipeSection(path, schema["description"], tuple(keys), tuple(sections))


def _section_schema(field: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of a field that is a section, or one section or a list of them; else None."""
    for option in (field, *field.get("oneOf", ())):
        if "$ref" in option:
            section: Mapping[str, Any] = defs[option["$ref"].rpartition("/")[2]]
            return section
    return None


def _allowed(field: Mapping[str, Any]) -> str:
    """The values of a field, in words: `number > 0 | null`."""
    if "anyOf" in field:
        return " | ".join(_allowed(option) for option in field["anyOf"])
    if choices := field.get("enum", [field["const"]] if "const" in field else []):
        return " | ".join(choices)
    kind = field["type"]
    if kind == "array":
        items = field.get("prefixItems")
        return f"list of {len(items)}: {_allowed(items[0])}" if items else f"list of {_allowed(field['items'])}"
    if kind == "string":
        return (
            f"text like {field['pattern']}"
            if "pattern" in field
            else "text, not empty"
            if "minLength" in field
            else "text"
        )
    words = {"integer": "whole number", "boolean": "true | false", "object": "mapping"}
    return f"{words.get(kind, kind)}{_bounds(field)}"


def _bounds(field: Mapping[str, Any]) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return ",".join(f" {sign} {_number(field[name])}" for name, sign in signs.items() if name in field)


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


def _choices(field: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that a field, or an item of its list, may be, where they are few."""
    inside = [*field.get("anyOf", ()), *([field["items"]] if "items" in field else ())]
    own = [*field.get("enum", ()), *([field["const"]] if "const" in field else ())]
    return (*own, *(choice for option in inside for choice in _choices(option)))


def _default(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
