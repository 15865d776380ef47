"""Write the pages on recipes, keys and verbs from what the code says of them: `python docs/make_recipes.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from bnfinetune.cli import VERBS
from bnfinetune.cli_help import values_in_recipes
from bnfinetune.cli_tasks import TASKS
from bnfinetune.cli_verbs import Verb
from bnfinetune.recipe_files import recipe_header, shipped_recipes
from bnfinetune.recipe_keys import RecipeSection, recipe_schema

DOCS = Path(__file__).parent

INTRODUCTION = """\
# Recipes

<!-- Written by docs/make_recipes.py from recipes/*.yaml. -->

A recipe is a YAML file that holds only what differs from the defaults of the [keys](reference/keys.md). The same words
work in a file, on the command line and from Python:

```yaml
# mine.yaml
base: freeze_bn          # a shipped recipe, or a path from here; leave it out to build on the defaults
model:
  name: resnet50
optim.lr: 3.0e-4         # dotted keys are as good as nested ones
```

```sh
bnfinetune recipe=mine.yaml data.source=path/to/images train.epochs=30
bnfinetune show recipe=mine.yaml             # the whole configuration, as a recipe again
```

```python
bnfinetune.finetune("mine.yaml", **{"data.source": "path/to/images", "train": {"epochs": 30}})
```

Later words win: the defaults, then the `base`, then the recipe, then the overrides in their order. Mappings are merged
key by key; lists and everything else are replaced.

| override | what it gives |
| --- | --- |
| `optim.lr=1e-3`, `model.pretrained=false`, `data.val_split=null` | a number, true or false, none: values are YAML |
| `data.source=path/to/images`, `bn.layers=*.bn1` | text; a glob may begin with `*` |
| `bn.layers='["layer3.*", "*.bn1"]'` | a list; inside one, text that begins with `*` is quoted |
| `data.config='"2024"'` | text that looks like a number |
| `model.kwargs='{drop_rate: 0.1}'`, `model.kwargs.drop_rate=0.1` | a key of a free mapping, either way |
| `bn='[{layers: layer4.*}, {exclude: layer4.*, affine: frozen}]'` | two sections of layers, each with its policy |
| `bn.1.affine=trained` | a key of the second of them |

In a recipe, `???` marks a value that whoever uses it has to give. A recipe cannot name environment variables or other
keys (`${...}`), carry YAML tags, or be larger than 64 KiB: it is data, never code.
"""


KEYS = """\
# Keys

<!-- Written by docs/make_recipes.py from bnfinetune/recipe.py and recipes/*.yaml. -->

Every key of a [recipe](../recipes.md), section by section. `bnfinetune help KEY` says the same in a terminal. Editors
complete and check recipe files by the schema that `bnfinetune schema` prints; what `bnfinetune cp freeze_bn mine.yaml`
writes names it.
"""

COMMAND_LINE = """\
# Command line

<!-- Written by docs/make_recipes.py from the verbs of bnfinetune/cli.py and bnfinetune/cli_lookup.py. -->

`bnfinetune [VERB] key=value ...`, also as `python -m bnfinetune`, `accelerate launch -m bnfinetune` and
`torchrun -m bnfinetune`. No verb means `train`. The exit code is 0, 1 where `check` finds an error, 2 after a mistake
of the user's, which is told in one line, 130 after Ctrl-C and 143 after SIGTERM.
"""


def pages() -> dict[Path, str]:
    """Every page that is written from the code, by its file."""
    return {
        DOCS / "recipes.md": f"{INTRODUCTION}\n## Shipped recipes\n\n{_joined(map(_recipe, *_shipped()))}",
        DOCS / "reference/keys.md": f"{KEYS}\n{_joined(map(_section, recipe_schema().walk()))}",
        DOCS / "reference/command_line.md": _command_line(),
    }


def _joined(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def _shipped() -> tuple[Iterable[str], Iterable[Path]]:
    shipped = shipped_recipes()
    return shipped.keys(), shipped.values()


def _command_line() -> str:
    tasks = "\n".join(f"| {task} | `{line}` |" for task, line in TASKS.items())
    common = f"## Common tasks\n\n| task | line |\n| --- | --- |\n{tasks}\n"
    in_order = sorted(VERBS.items(), key=lambda entry: entry[1].looks_up)
    return f"{COMMAND_LINE}\n{common}\n{_joined(_verb(name, verb) for name, verb in in_order)}"


def _verb(name: str, verb: Verb) -> str:
    text, _, examples = verb.help.partition("\n\nExamples:\n")
    lines = "\n".join(line.strip() for line in examples.splitlines())
    rows = "\n".join(f"| `{option}=` | {_cell(meaning)} |" for option, meaning in verb.options.items())
    options = f"\n| option | |\n| --- | --- |\n{rows}\n" if rows else ""
    shown = f"\n```sh\n{lines}\n```\n" if lines else ""
    usage = f"bnfinetune {name} {verb.usage}".rstrip()
    return f"## {name}\n\n```text\n{usage}\n```\n\n{text}\n{options}{shown}"


def _recipe(name: str, path: Path) -> str:
    header = recipe_header(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    body = "\n".join(itertools.dropwhile(lambda line: line.startswith("#"), lines)).strip()
    claim = "\n".join(line for line in header[1:] if not line.startswith("Run: "))
    launch = "\n".join(line.removeprefix("Run: ") for line in header if line.startswith("Run: "))
    settings = f"\n\n```yaml\n{body}\n```" if body else ""
    return f"### {name}\n\n{header[0]}\n\n{claim}{settings}\n\n```sh\n{launch}\n```\n"


def _section(section: RecipeSection) -> str:
    rows = "\n".join(
        f"| `{key.path}` | {_cell(key.allowed)} | `{key.default}` | {_cell(key.help)}{_setters(key.path)} |"
        for key in section.keys
    )
    head = "| key | values | default | |\n| --- | --- | --- | --- |"
    return f"## {section.path or 'The recipe itself'}\n\n{section.help}\n\n{head}\n{rows}\n"


def _setters(path: str) -> str:
    named = ", ".join(f"[{name}](../recipes.md#{name})" for name in values_in_recipes(path))
    return f" (set by {named})" if named else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
