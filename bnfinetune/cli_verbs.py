"""What a verb of the command line is, and what stands behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bnfinetune.errors import RecipeError, did_you_mean


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
            raise RecipeError(
                f"{option}: found {value!r}; allowed: {' | '.join(choices)}{did_you_mean(value, choices)}"
            )
        return value


Action = Callable[[Arguments], None]


@dataclass(frozen=True)
class Verb:
    """A verb of the command line: the function that does it, and how it is called.

    Attributes:
        run: What does it; its docstring is the verb's help.
        usage: What may stand behind the verb.
        options: Each option of its own, and what it means.
        takes_overrides: Whether keys of a recipe may stand behind it.
        takes_paths: Whether words without `=` may stand behind it.
        looks_up: Whether it tells of recipes, keys or this machine, and touches no network and no images.
    """

    run: Action
    usage: str
    options: Mapping[str, str]
    takes_overrides: bool = False
    takes_paths: bool = False
    looks_up: bool = False

    @property
    def summary(self) -> str:
        return self.help.partition("\n")[0]

    @property
    def help(self) -> str:
        return (self.run.__doc__ or "").replace("\n    ", "\n").strip()


VERBS: dict[str, Verb] = {}


def verb(
    usage: str, *, overrides: bool = False, paths: bool = False, lookup: bool = False, **options: str
) -> Callable[[Action], Action]:
    """Enter a function in the table of verbs under its own name, without the `_` that keeps it off Python's names."""

    def enter(run: Action) -> Action:
        VERBS[run.__name__.rstrip("_")] = Verb(run, usage, options, overrides, paths, lookup)
        return run

    return enter
