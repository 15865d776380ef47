"""From the words of a command line to what a verb is given, and what was meant by words that are none."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from bnfinetune.cli_verbs import VERBS, Arguments, Verb
from bnfinetune.errors import RecipeError, did_you_mean


def parse(name: str, words: Sequence[str]) -> Arguments:
    """Sort the words behind a verb into its options, overrides and paths.

    Raises:
        RecipeError: A word is none that the verb takes.
    """
    spec, arguments = VERBS[name], Arguments()
    for position, word in enumerate(words):
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            raise RecipeError(_with_dashes(words[position:], spec))
        if equals and key in spec.options:
            if key in arguments.options:
                raise RecipeError(f"{key}= is given twice: {arguments.options[key]} and {value}")
            if not value:
                raise RecipeError(f"{key}= has no value; allowed: {spec.options[key]}")
            arguments.options[key] = os.path.expanduser(value)  # shells leave a ~ behind = as it is
        elif spec.takes_overrides and (equals or not spec.takes_paths):
            if equals and not value:
                _refuse_bare_name(key)
            arguments.overrides.append(word)
        elif spec.takes_paths and (not equals or os.path.exists(word)):
            arguments.paths.append(word)
        else:
            known = ", ".join(f"{option}=" for option in spec.options) or "nothing"
            raise RecipeError(f"{word}: no argument of {name}{did_you_mean(key, spec.options)}; allowed: {known}")
    return arguments


def not_a_verb(word: str) -> str:
    """What to say of a first word that is neither a verb nor key=value."""
    from bnfinetune.recipe_files import shipped_recipes

    if word in shipped_recipes() or word.endswith((".yaml", ".yml")):
        return f"{word}: no such verb; did you mean recipe={word}?"
    return f"{word}: no such verb{did_you_mean(word, VERBS)}; allowed: {', '.join(VERBS)}, or key=value to train"


def _with_dashes(words: Sequence[str], spec: Verb) -> str:
    """What to say of `--lr 1e-3` or `--lr=1e-3`: the key that it stands for, with its value."""
    name, equals, value = words[0].lstrip("-").partition("=")
    following = words[1] if len(words) > 1 and "=" not in words[1] and not words[1].startswith("-") else ""
    start = f"{words[0].partition('=')[0]}: arguments are written key=value, without dashes"
    meant = _meant(name.replace("-", "_"), spec)
    if meant is None:
        return f"{start}, such as recipe=freeze_bn"
    word = f"{meant}={value if equals else following or 'VALUE'}"
    return f"{start}; did you mean {shlex.quote(word)}?"


def _meant(name: str, spec: Verb) -> str | None:
    from bnfinetune.recipe_hints import meant_key
    from bnfinetune.recipe_keys import RecipeKey, find_key

    if name in spec.options:
        return name
    key = meant_key(name) if spec.takes_overrides and len(name) > 1 else None
    return key if key and isinstance(find_key(key), RecipeKey) else None


def _refuse_bare_name(name: str) -> None:
    """Answer `lr=` by its whole name; what is a key is told by the recipe how its value may be none."""
    from bnfinetune.recipe_hints import meant_key
    from bnfinetune.recipe_keys import find_key

    if name and find_key(name) is None and (meant := meant_key(name)):
        raise RecipeError(f"{name}= has no value, and is no key; did you mean {meant}=VALUE?")
