"""What is wrong with a recipe, in one line: the key, what was found, what is allowed, the nearest valid name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from bnfinetune.errors import did_you_mean
from bnfinetune.recipe import BN_FORMS
from bnfinetune.recipe_hints import suggestion
from bnfinetune.recipe_keys import RecipeSection, find_key, recipe_schema
from bnfinetune.recipe_text import describe


def explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """The first mistake that the schema found, and how many more there are.

    Args:
        error: What pydantic raised.
        origins: The file that each dotted key came from; empty for the caller's own.
    """
    mistakes = error.errors(include_url=False)
    keys = [_dotted(mistake["loc"]) for mistake in mistakes]
    more = len({_whole(key) for key in keys}) - 1
    also = f" (and {more} more {'mistake' if more == 1 else 'mistakes'})" if more else ""
    key, kind, context = keys[0], mistakes[0]["type"], mistakes[0].get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(key, mistakes[0]["input"], origins) + also
    if kind == "value_error":
        return (f"{key}: {context['error']}" if key else str(context["error"])) + also
    return _unfit(_whole(key) if kind == "missing" else key, mistakes[0]["input"], origins) + also


def _unfit(key: str, found: Any, origins: Mapping[str, str]) -> str:
    target = find_key(key)
    where = place(key, origins)
    start = f"{key}: found {describe(found)}{where}"
    if target is None or isinstance(target, RecipeSection):
        if target is not None and (meant := suggestion(key, found, in_file=bool(where))):
            return f"{start}, where a section is; did you mean {meant}?"
        return f"{start}; allowed: the keys {_names(target or recipe_schema())}"
    hint = ""
    if isinstance(found, str):
        hint = did_you_mean(found.lower(), target.choices)
    elif target.allowed.startswith("text") and isinstance(found, int | float):
        hint = f"; as text it is {describe(found)!r}"
    return f"{start}; allowed: {target.allowed}{hint}"


def _unknown(key: str, found: Any, origins: Mapping[str, str]) -> str:
    above = find_key(key.rpartition(".")[0])
    where = place(key, origins)
    meant = suggestion(key, found, in_file=bool(where))
    hint = f"; did you mean {meant}?" if meant else ""
    names = _names(above) if isinstance(above, RecipeSection) and not meant else ""
    return f"{key}: no such key{where}{hint}{f'; allowed: {names}' if names else ''}"


def _names(section: RecipeSection) -> str:
    return ", ".join(part.leaf for part in section.parts)


def _whole(key: str) -> str:
    """A place inside a value, as `data.augment.scale.1`, as the key of that value."""
    target = find_key(key)
    return target.path if target else key


def _dotted(location: Sequence[str | int]) -> str:
    """The dotted key of a place in the validated data, without the names that pydantic gives to a union's branches."""
    parts: list[str] = []
    for part in location:
        inside_section = isinstance(find_key(".".join(parts)), RecipeSection)
        if isinstance(part, int) or (inside_section and part not in BN_FORMS):
            parts.append(str(part))
    return ".".join(parts)


def place(key: str, origins: Mapping[str, str]) -> str:
    """` in FILE` where a file gave the key, or a key above or below it; nothing where the caller did."""
    while key:
        for known, origin in reversed(list(origins.items())):
            if known == key or known.startswith(f"{key}."):
                return f" in {origin}" if origin else ""
        key = key.rpartition(".")[0]
    return ""
