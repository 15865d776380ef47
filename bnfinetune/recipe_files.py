"""Recipes as files: found by name or path, built on a base, changed by overrides, checked against the schema."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from bnfinetune.errors import RecipeError, did_you_mean
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_keys import RecipeSection, find_key, takes_text
from bnfinetune.recipe_mistakes import explain, place
from bnfinetune.recipe_text import MAX_BYTES, describe, flatten, plain, read_override, read_yaml

Layer = tuple[str, dict[str, Any]]

MODELINE = "# yaml-language-server: $schema="
"""How the comment begins by which editors find the schema of a YAML file."""

_CALLER = ""  # the origin of what comes from no file


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with bnfinetune, by name: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    folder = next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_header(path: Path) -> list[str]:
    """The comment lines that open a recipe file, without their `#`: first what it is for, then the claim, then how.

    The line that names the schema is for editors and left out.
    """
    opening = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return [line.lstrip("#").strip() for line in opening if not line.startswith(MODELINE)]


def recipe_settings(name_or_path: str | Path) -> dict[str, Any]:
    """What a recipe and its bases set, by dotted key such as `optim.lr` or `bn.0.layers`, but for its name."""
    settings: dict[str, Any] = {}
    for _, tree in _layers(name_or_path):
        settings |= _leaves({key: plain(value, key) for key, value in flatten(tree) if key != "name"})
    return settings


def load_recipe(
    name_or_path: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Recipe:
    """A complete recipe from a shipped one, a file, or a mapping, with overrides on top.

    Mappings are merged key by key, everything else is replaced: the defaults of the schema, then the recipe that
    `base:` names, then the recipe itself, then the overrides in their order.

    Args:
        name_or_path: Name of a shipped recipe, path of a YAML file, a mapping of the same form, or a recipe.
        overrides: Texts such as `optim.lr=1e-3`, or a mapping with dotted keys, nested mappings or both.

    Raises:
        RecipeError: Something is unknown, of the wrong type or out of bounds. The message is one line for the first
            mistake, and counts the others.
    """
    config, origins = OmegaConf.create({}), dict[str, str]()
    for origin, tree in _layers(name_or_path):
        values = {key: plain(value, key) for key, value in flatten(tree)}
        config = _merge(config, values)
        origins |= dict.fromkeys(values, origin)
    for key, value in _override_values(overrides):
        _set(config, key, plain(value, key))
        origins[key] = _CALLER
    for missing in sorted(OmegaConf.missing_keys(config)):
        key = re.sub(r"\[(\d+)\]", r".\1", missing)
        raise RecipeError(f"{key}: still open (???{place(key, origins)}); give {key}=VALUE")
    try:
        return Recipe.model_validate_json(json.dumps(OmegaConf.to_container(config, resolve=False)), strict=True)
    except ValidationError as error:
        raise RecipeError(explain(error, origins)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, every default written out; `load_recipe` reads it back to the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


def diff_recipes(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """Each dotted key whose value differs, with both values; `None` stands where one recipe has no such key."""
    one, two = _leaves(first.model_dump(mode="json")), _leaves(second.model_dump(mode="json"))
    return {key: (one.get(key), two.get(key)) for key in {**one, **two} if one.get(key) != two.get(key)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, with a list of mappings opened up as `bn.0.layers` and an empty mapping kept."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(position): item for position, item in enumerate(value)}
        if isinstance(value, dict) and value:
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def _layers(source: str | Path | Mapping[str, Any] | Recipe) -> list[Layer]:
    """The recipe and the bases below it, lowest first."""
    if isinstance(source, Recipe):
        return [(_CALLER, source.model_dump(mode="json"))]
    if isinstance(source, Mapping):
        return _with_bases(_CALLER, dict(source), Path(), ())
    path = _find(str(source), Path())
    (*bases, (origin, tree)) = _file_layers(path, ())
    return [*bases, (origin, {"name": re.sub(r"[^\w.-]+|^\W", "_", path.stem), **tree})]


def _file_layers(path: Path, above: tuple[Path, ...]) -> list[Layer]:
    real = path.resolve()
    if real in above:
        chain = " -> ".join(file.name for file in (*above[above.index(real) :], real))
        raise RecipeError(f"base: {chain} goes round in a circle")
    return _with_bases(str(path), read_yaml(_read(path), str(path), takes_text), path.parent, (*above, real))


def _with_bases(origin: str, tree: dict[str, Any], folder: Path, above: tuple[Path, ...]) -> list[Layer]:
    base = tree.pop("base", None)
    if base is None:
        return [(origin, tree)]
    if not isinstance(base, str):
        raise RecipeError(
            f"base: found {describe(base)}{f' in {origin}' if origin else ''}; allowed: the name or path of one recipe"
        )
    return [*_file_layers(_find(base, folder), above), (origin, tree)]


def _find(name: str, folder: Path) -> Path:
    """The file of a shipped recipe's name, or of a path relative to `folder`."""
    name = os.path.expanduser(name)
    if name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name:
        path = folder / name
        if not os.path.isfile(path):  # unlike Path.is_file, false for any text that cannot be a path
            hint = f"; recipe={path.stem} is shipped" if path.stem in shipped_recipes() else ""
            raise RecipeError(f"recipe: there is no file {path}{hint}")
        return path
    shipped = shipped_recipes()
    if name not in shipped:
        own = (
            f"; your own file is recipe=./{name}.yaml"
            if (folder / f"{name}.yaml").is_file()
            else did_you_mean(name, shipped)
        )
        raise RecipeError(f"recipe: no shipped recipe {describe(name)}{own} (shipped: {', '.join(shipped)})")
    return shipped[name]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(f"{path}: longer than the {MAX_BYTES // 1024} KiB that a recipe may have")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error


def override_keys(overrides: Sequence[str] | Mapping[str, Any]) -> set[str]:
    """The dotted keys that overrides give."""
    return {key for key, _ in _override_values(overrides)}


def _override_values(overrides: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of overrides, in their order."""
    if isinstance(overrides, Mapping):
        yield from flatten(overrides)
    elif isinstance(overrides, str):
        raise RecipeError(f"overrides: found {describe(overrides)}; allowed: a list of key=value texts, or a mapping")
    else:
        for text in overrides:
            yield from flatten(dict([read_override(text, takes_text)]))


def _merge(config: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """The configuration with the values of one recipe on top; a `bn` of the other form replaces the one below."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, leaf = key.split(".")
        here = tree
        for section in sections:
            here = here.setdefault(section, {})
            if not isinstance(here, dict):
                raise RecipeError(f"{key}: {section} is also given as {describe(here)}")
        here[leaf] = value
    if "bn" in tree and isinstance(tree["bn"], list) != isinstance(config.get("bn"), ListConfig):
        config.pop("bn", None)
    try:
        merged = OmegaConf.merge(config, tree)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise RecipeError(str(error).splitlines()[0]) from error
    assert isinstance(merged, DictConfig)
    return merged


def _set(config: DictConfig, key: str, value: Any) -> None:
    """Put one value under a dotted key; lists are entered by position."""
    node: Any = config
    done: list[str] = []
    for part in key.split("."):
        here = ".".join(done)
        if isinstance(node, ListConfig) and not part.isdigit():
            raise RecipeError(f"{key}: {here} is a list of {len(node)} here; write {here}.0.{part}")
        if isinstance(node, ListConfig) and int(part) >= len(node):
            raise RecipeError(f"{key}: {here} is a list of {len(node)}, counted from 0; replace it with {here}=[...]")
        if part.isdigit() and not isinstance(node, ListConfig) and isinstance(find_key(here), RecipeSection):
            raise RecipeError(f"{key}: {here} is one section here; write {key.replace(f'.{part}', '', 1)}")
        if not isinstance(node, DictConfig | ListConfig):
            break
        node = node[int(part)] if isinstance(node, ListConfig) else node.get(part)
        done.append(part)
    try:
        OmegaConf.update(config, key, value, merge=False)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise RecipeError(f"{key}: {str(error).splitlines()[0]}") from error
