"""What a verb of the command line is, and what stands behind it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bnfinetune.errors import RecipeError


@dataclass(frozen=True)
class Arguments:
    """What stands behind a verb: its own options, overrides of the recipe, and paths."""

    options: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def need(self, option: str, remedy: str) -> str:
        """The value of an option that the verb cannot do without."""
        if option not in self.options:
            raise RecipeError(f"{option}= is missing; {remedy}")
        return self.options[option]

    def choose(self, option: str, *choices: str) -> str:
        """The value of an option that has few values, of which the first is the default."""
        value = self.options.get(option, choices[0])
        if value not in choices:
            raise RecipeError(f"{option}: found {value!r}; allowed: {' | '.join(choices)}{near(value, choices)}")
        return value


Action = Callable[[Arguments], None]


@dataclass(frozen=True)
class Verb:
    """A verb of the command line: the function that does it, and how it is called."""

    run: Action
    usage: str
    options: Mapping[str, str]
    takes_overrides: bool = False
    takes_paths: bool = False

    @property
    def summary(self) -> str:
        return self.help.partition("\n")[0]

    @property
    def help(self) -> str:
        return (self.run.__doc__ or "").replace("\n    ", "\n").strip()


VERBS: dict[str, Verb] = {}


def verb(usage: str, *, overrides: bool = False, paths: bool = False, **options: str) -> Callable[[Action], Action]:
    """Enter a function in the table of verbs under its own name."""

    def enter(run: Action) -> Action:
        VERBS[run.__name__] = Verb(run, usage, options, takes_overrides=overrides, takes_paths=paths)
        return run

    return enter


def near(found: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """The end of a message about a name that is none of these: which one may have been meant."""
    near = difflib.get_close_matches(found, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
