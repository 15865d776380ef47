"""From YAML text to plain values: bounded, untagged, without aliases that multiply and without interpolation.

A recipe or an override may come from a stranger. Text is therefore read as a stream of YAML events before anything
is built from it, and refused where it could run code, name the environment, or grow beyond its own size.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bnfinetune.errors import RecipeError

MAX_BYTES = 64 * 1024
MAX_NODES = 2_000
MAX_DEPTH = 32

_PART = r"[A-Za-z0-9_][\w-]*"
_KEY = re.compile(rf"{_PART}(\.{_PART})*", re.ASCII)
_TEXT = re.compile(r"[*&!%@`|>#]|[^\"'\[{].*\s#", re.DOTALL)
TakesText = Callable[[str], tuple[bool, bool]]

_QUOTE_GLOBS = "text that begins with * is quoted"


def _untold(key: str) -> tuple[bool, bool]:
    """Without a schema, YAML's reading stands."""
    return False, False


def read_yaml(text: str, origin: str, takes_text: TakesText = _untold) -> dict[Any, Any]:
    """The mapping that a recipe file holds, as plain Python values; empty text is an empty recipe.

    Args:
        text: The YAML.
        origin: Name of the file, for messages.
        takes_text: As for `read_override`.

    Raises:
        RecipeError: It is not one YAML mapping, or is larger, deeper or more repetitive than a recipe can be, or it
            holds a tag (`!...`) or an interpolation (`${...}`).
    """
    root = _check_events(text, origin)
    if not isinstance(root, yaml.MappingStartEvent | None):
        found = describe(root.value) if isinstance(root, yaml.ScalarEvent) else "a list"
        raise RecipeError(f"{origin}: found {found}; a recipe is a mapping of keys to values")
    try:
        config = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise RecipeError(f"{origin}: {_reason(error)}") from error
    return as_written(config, yaml.load(text, yaml.BaseLoader), "", takes_text) if isinstance(config, dict) else {}


def read_override(text: str, takes_text: TakesText = _untold) -> tuple[str, Any]:
    """Split `key.sub=value`; the value is YAML: `true`, `1e-3`, `null`, `[a, b]`, `{drop_rate: 0.1}`, text.

    A value that begins with a character that YAML reserves, as the glob `*.bn1` does, is text, and so is ` #`. Where a
    key takes text alone, everything is text as it stands, but `null` and what is quoted: `yes`, `010`, `12:30`, `a: b`.

    Args:
        text: The override.
        takes_text: Of a key, whether it takes text alone, and whether it takes a list of texts.

    Raises:
        RecipeError: There is no `=`, the key is not dotted names, the value is missing or not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"{text}: an override is written key=value, such as optim.lr=1e-3")
    check_key(key)
    if not value.strip():
        raise RecipeError(f"{key}= has no value; write {key}=null for none, or {key}='\"\"' for empty text")
    only_text, text_list = takes_text(key)
    stripped = value.strip()
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "\"'"
    as_it_stands = only_text and not quoted and stripped.lower() not in ("null", "~")
    if _TEXT.match(value) or (as_it_stands and not (text_list and stripped.startswith("["))):
        return key, plain(stripped if as_it_stands else value, key)
    _check_events(value, key)
    try:
        config = OmegaConf.from_dotlist([f"value={value}"])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise RecipeError(f"{key}: {_reason(error)}") from error
    found = OmegaConf.to_container(config, resolve=False)["value"]  # type: ignore[call-overload,index]
    return key, as_written(found, yaml.load(value, yaml.BaseLoader), key, takes_text)


def as_written(value: Any, text: Any, key: str, takes_text: TakesText = _untold) -> Any:
    """What YAML read, with the words that it was written with where a key takes text: `yes`, not true.

    Args:
        value: What YAML read.
        text: The same with every scalar as text.
        key: Its dotted key; empty for a whole recipe.
        takes_text: As for `read_override`.
    """
    if isinstance(value, Mapping) and isinstance(text, Mapping):
        below = f"{key}." if key else ""
        return {k: as_written(v, text.get(str(k)), f"{below}{k}", takes_text) for k, v in value.items()}
    only_text, text_list = takes_text(key)
    if isinstance(value, list) and isinstance(text, list) and len(value) == len(text):
        if text_list:
            return [t if isinstance(t, str) and not isinstance(v, str) else v for v, t in zip(value, text, strict=True)]
        return [as_written(v, t, key, takes_text) for v, t in zip(value, text, strict=True)]
    return text if only_text and isinstance(value, bool | int | float) and isinstance(text, str) else value


def check_key(key: object) -> None:
    """Raise RecipeError unless `key` is dotted names, such as `optim.schedule.name` or `bn.0.layers`."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise RecipeError(f"{key!r} is not a key; keys are dotted names, such as optim.lr or bn.0.layers")


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings under its dotted key; lists are values. Dotted keys are as good as nested ones.

    Raises:
        RecipeError: A key is not a dotted name, or mappings are nested too deeply.
    """
    if prefix.count(".") > MAX_DEPTH:
        raise RecipeError(f"{prefix[:60]}...: nested more than {MAX_DEPTH} deep")
    for name, value in tree.items():
        check_key(name)
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain(value: Any, key: str, depth: int = 0) -> Any:
    """A value from Python as YAML would give it: paths become text, tuples lists, NumPy scalars numbers.

    Raises:
        RecipeError: It is of a type that a recipe cannot hold, or holds an interpolation.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, str):
        _check_text(value, key)
        return value
    if isinstance(value, int) and value.bit_length() > 64:
        raise RecipeError(f"{key}: found a whole number of {value.bit_length()} bits; 64 are enough for a recipe")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple) and depth < MAX_DEPTH:
        return [plain(item, key, depth + 1) for item in value]
    if isinstance(value, Mapping) and depth < MAX_DEPTH and all(isinstance(name, str) for name in value):
        return {name: plain(item, f"{key}.{name}", depth + 1) for name, item in value.items()}
    raise RecipeError(
        f"{key}: found {describe(value)}; a recipe holds text, numbers, true, false, null, lists, mappings"
    )


def describe(value: Any) -> str:
    """A found value for a message, short and on one line, in YAML's terms."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(repr, value)) or 'nothing'}"[:60]
    shown = repr(value) if isinstance(value, str | int | float | list) else f"a {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:56]} ..."


def _check_events(text: str, origin: str) -> yaml.Event | None:
    """Walk the YAML without building it, and give its root; an alias counts as all that it stands for."""
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{origin}: longer than the {MAX_BYTES // 1024} KiB that a recipe may have")
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    sizes: dict[str | None, int] = {}
    root = None
    for event in _events(text, origin):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            size = 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            sizes[anchor] = size
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = size = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise RecipeError(f"{origin}: *{event.anchor} stands for nothing; {_QUOTE_GLOBS}")
            size = sizes[event.anchor]
        else:
            continue
        root = root or event
        anchor, before = open_nodes[-1]
        open_nodes[-1] = (anchor, before + size)
        if len(open_nodes) > MAX_DEPTH or before + size > MAX_NODES:
            raise RecipeError(f"{origin}: more than {MAX_DEPTH} levels or {MAX_NODES} values; no recipe needs that")
    return root


def _events(text: str, origin: str) -> Iterator[yaml.Event]:
    """The YAML events of untagged text that stands for itself."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if tag := getattr(event, "tag", None):
                raise RecipeError(f"{origin}: the tag {describe(tag)} is refused; a recipe holds plain values only")
            if isinstance(event, yaml.ScalarEvent):
                _check_text(event.value, origin)
            yield event
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: {_reason(error)}") from error


def _check_text(text: str, origin: str) -> None:
    """Refuse interpolation, which could copy the environment into saved recipes, and text that is not Unicode."""
    if "${" in text:
        raise RecipeError(f"{origin}: {describe(text)} asks for interpolation; a recipe holds plain values only")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise RecipeError(f"{origin}: {describe(text)} is not valid Unicode")


def _reason(error: Exception) -> str:
    """What a YAML or OmegaConf error says, on one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split("full_key")[0].split())
    line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    remedy = f"; {_QUOTE_GLOBS}" if "alias" in (error.context or "") else ""
    return f"not YAML: {line}{' '.join((error.problem or '').split())}{remedy}"
