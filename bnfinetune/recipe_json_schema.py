"""The schema of recipe files for editors: JSON Schema, draft 2020-12, of what `load_recipe` reads.

A file may say more than the model of a recipe has: `base:`, dotted keys at any depth, and unquoted `yes`, `010` or `12`
where a key takes text. Rules that tie several keys to each other are not in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import shipped_recipes
from bnfinetune.recipe_keys import RecipeSection, recipe_schema, takes_text

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
FILE_NAME: Final = "recipe.schema.json"

_BASE: Final = {"type": "string", "description": "the recipe that this one builds on: a shipped one's name, or a path"}
_UNQUOTED: Final = ("string", "number", "boolean")  # words that YAML reads so, and load_recipe as they are written


def json_schema() -> dict[str, Any]:
    """The schema as plain values."""
    schema = _for_yaml(Recipe.model_json_schema())
    definitions = schema.pop("$defs")
    places = {"": schema}
    for section in recipe_schema().walk():
        here = places[section.path]
        for key in section.keys:
            here["properties"][key.leaf] = _as_loaded(here["properties"][key.leaf], *takes_text(key.path))
        for below in section.sections:
            places[below.path] = definitions[_definition(here["properties"][below.leaf])]
    for section in recipe_schema().walk():
        if patterns := dict(_dotted(section, places[section.path], definitions)):
            places[section.path]["patternProperties"] = patterns
    properties = {"base": _BASE, **schema.pop("properties")}
    return {
        "$schema": DIALECT,
        "title": "A recipe of bnfinetune",
        **schema,
        "properties": properties,
        "$defs": definitions,
    }


def schema_text() -> str:
    """The schema as a file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def shipped_schema() -> Path:
    """The schema's file beside the shipped recipes."""
    return next(iter(shipped_recipes().values())).with_name(FILE_NAME)


def _for_yaml(node: Any) -> Any:
    """Without the titles that pydantic makes of names, and with `false` for a bare `no` or `off` of YAML 1.1."""
    if isinstance(node, list):
        return [_for_yaml(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {name: _for_yaml(value) for name, value in node.items() if name != "title" or not isinstance(value, str)}
    if {"no", "off"} & set(kept.get("enum", ())):
        kept.pop("type")
        kept["enum"] = [*kept["enum"], False]
    return kept


def _as_loaded(field: dict[str, Any], only_text: bool, text_list: bool) -> dict[str, Any]:
    """A key's schema with the unquoted words that `load_recipe` takes for text."""
    options = [_as_loaded(option, only_text, text_list) for option in field.get("anyOf", ())]
    if options:
        return {**field, "anyOf": options}
    if only_text and field.get("type") == "string":
        return {**field, "type": list(_UNQUOTED)}
    if text_list and field.get("type") == "array":
        return {**field, "items": {**field["items"], "type": list(_UNQUOTED)}}
    return field


def _dotted(
    section: RecipeSection, here: dict[str, Any], definitions: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Patterns of the dotted keys that may stand in a section: `schedule.name` in `optim`, both in the recipe."""
    for key in section.keys:
        if key.allowed == "mapping":
            yield f"^{re.escape(f'{prefix}{key.leaf}')}\\..+$", True
    for below in section.sections:
        name = _definition(here["properties"][below.leaf])
        path = f"{prefix}{below.leaf}"
        if prefix:
            yield f"^{re.escape(path)}$", {"$ref": f"#/$defs/{name}"}
        for key in below.keys:
            yield f"^{re.escape(f'{path}.{key.leaf}')}$", {"$ref": f"#/$defs/{name}/properties/{key.leaf}"}
        yield from _dotted(below, definitions[name], definitions, f"{path}.")


def _definition(field: dict[str, Any]) -> str:
    """The name of the definition of a section's field, which may also take a list of sections."""
    reference = next(option["$ref"] for option in (field, *field.get("oneOf", ())) if "$ref" in option)
    return str(reference).rpartition("/")[2]
