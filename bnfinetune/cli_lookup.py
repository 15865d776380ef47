"""The verbs that look something up: recipes, their keys and schema, this machine, the words of the command line."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from bnfinetune.cli_verbs import VERBS, Arguments, verb
from bnfinetune.errors import RecipeError, did_you_mean

_SHELLS = ("bash", "zsh", "fish")


@verb("[VERB|KEY|RECIPE]", paths=True, lookup=True)
def help_(arguments: Arguments) -> None:
    """Say what a verb does, what a key of a recipe means and which recipes set it, or what a recipe is for.

    Examples:
      bnfinetune help optim.lr
      bnfinetune help bn
      bnfinetune help compare
    """
    from bnfinetune import cli_help

    if not arguments.paths:
        cli_help.print_all(VERBS)
    for name in arguments.paths:
        cli_help.print_about(name, VERBS)


@verb("", lookup=True)
def recipes(arguments: Arguments) -> None:
    """List the shipped recipes and what each is for."""
    from bnfinetune.recipe_files import recipe_header, shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, path in shipped.items():
        print(f"{name:{width}}  {recipe_header(path)[0]}")


@verb(
    "[recipe=NAME|FILE] [key=value ...]",
    overrides=True,
    lookup=True,
    recipe="a shipped recipe's name, or the path of your own YAML file; left out: the defaults",
)
def show(arguments: Arguments) -> None:
    """Print the whole configuration of a recipe with overrides, as YAML that is a recipe again.

    Examples:
      bnfinetune show recipe=freeze_bn
      bnfinetune show recipe=freeze_bn optim.lr=3e-4 bn.layers='layer4.*' > mine.yaml
    """
    from bnfinetune.recipe_files import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(arguments.options.get("recipe", {}), arguments.overrides)), end="")


@verb("RECIPE FILE.yaml", paths=True, lookup=True)
def cp(arguments: Arguments) -> None:
    """Copy a shipped recipe with its comments, to begin your own with; an existing file is never overwritten.

    Editors with YAML support complete and check the copy by the schema that its comment names.

    Examples:
      bnfinetune cp freeze_bn mine.yaml
    """
    from bnfinetune.recipe_files import shipped_recipes

    if len(arguments.paths) != 2:
        raise RecipeError("cp takes a shipped recipe and a new file: bnfinetune cp freeze_bn mine.yaml")
    name, shipped = arguments.paths[0], shipped_recipes()
    if name not in shipped:
        raise RecipeError(
            f"{name}: no shipped recipe{did_you_mean(name, shipped)} (shipped: {', '.join(shipped)}); "
            f"your own file is copied by the cp of the shell"
        )
    target = _new_file(arguments.paths[1], name)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(_own_copy(name, shipped[name], target))
    except FileExistsError as error:
        raise RecipeError(f"{target}: there is such a file already; choose another name") from error
    except OSError as error:
        raise RecipeError(f"{target}: {error.strerror}; choose another place") from error
    print(f"{target} is yours. It is run by\n\n  bnfinetune {shlex.quote(f'recipe={target}')}")


@verb("", lookup=True)
def schema(arguments: Arguments) -> None:
    """Print the JSON Schema (draft 2020-12) of recipe files, by which editors complete and check them.

    Examples:
      bnfinetune schema > recipe.schema.json
    """
    from bnfinetune.recipe_json_schema import schema_text

    print(schema_text(), end="")


@verb("[format=table|json]", lookup=True, format="table (default) or json")
def env(arguments: Arguments) -> None:
    """Print versions, devices, threads and the variables that matter, for a report of a fault; no secrets.

    Examples:
      bnfinetune env
      bnfinetune env format=json
    """
    form = arguments.choose("format", "table", "json")

    from bnfinetune.machine import describe_machine

    machine = describe_machine()
    print(json.dumps(machine, indent=2) if form == "json" else "\n".join(_lines(machine)))


@verb("bash|zsh|fish", paths=True, lookup=True)
def completion(arguments: Arguments) -> None:
    """Print a script by which a shell completes verbs, keys, their values and recipe names.

    Examples:
      echo 'source <(bnfinetune completion bash)' >> ~/.bashrc
      echo 'source <(bnfinetune completion zsh)' >> ~/.zshrc
      bnfinetune completion fish > ~/.config/fish/completions/bnfinetune.fish
    """
    from bnfinetune.cli_completion import script

    if len(arguments.paths) != 1 or arguments.paths[0] not in _SHELLS:
        found = f"found {' '.join(arguments.paths)!r}; " if arguments.paths else ""
        raise RecipeError(f"completion: {found}name one shell: {', '.join(_SHELLS)}")
    print(script(arguments.paths[0], VERBS), end="")


def _new_file(path: str, recipe: str) -> Path:
    """Where a copy goes: a file that ends as recipes do, or a folder, in which it keeps its name."""
    target = Path(os.path.expanduser(path))
    if target.is_dir():
        return target / f"{recipe}.yaml"
    if target.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{path}: a recipe's file ends in .yaml; write {path}.yaml")
    return target


def _own_copy(name: str, path: Path, target: Path) -> str:
    """The text of a shipped recipe, with its launch line and the place of the schema as they are for the copy."""
    from bnfinetune.recipe_files import MODELINE
    from bnfinetune.recipe_json_schema import shipped_schema

    own, schema = f"recipe={target}", shipped_schema().resolve().as_uri()
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [re.sub(rf"\brecipe={name}\b", lambda _: own, line) if line.startswith("# ") else line for line in lines]
    return "\n".join(f"{MODELINE}{schema}" if line.startswith(MODELINE) else line for line in lines) + "\n"


def _lines(tree: dict[str, Any], indent: str = "") -> list[str]:
    """Nested values as lines, each name in a column of its own."""
    width = max(map(len, tree), default=0)
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}{'' if value else '  none'}", *_lines(value, f"{indent}  ")]
        else:
            shown = ("; ".join(value) or "none") if isinstance(value, list) else value
            lines.append(f"{indent}{name:{width}}  {shown}")
    return lines
