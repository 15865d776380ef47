"""Write docs/recipes.md from the recipe files and the schema: `python docs/make_recipes.py`."""

from __future__ import annotations

import itertools
from pathlib import Path

from bnfinetune.recipe_files import recipe_header, shipped_recipes
from bnfinetune.recipe_keys import RecipeSection, recipe_schema

PAGE = Path(__file__).with_name("recipes.md")

INTRODUCTION = """\
# Recipes

<!-- Written by docs/make_recipes.py from recipes/*.yaml and bnfinetune/recipe.py. -->

A recipe is a YAML file that holds only what differs from the defaults of the [keys](#keys) below. The same words work
in a file, on the command line and from Python:

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


def page() -> str:
    """The whole page."""
    shipped = "\n".join(_recipe(name, path) for name, path in shipped_recipes().items())
    keys = "\n".join(_section(section) for section in recipe_schema().walk())
    return f"{INTRODUCTION}\n## Shipped recipes\n\n{shipped}\n## Keys\n\n{keys}"


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
        f"| `{key.path}` | {_cell(key.allowed)} | `{key.default}` | {_cell(key.help)} |" for key in section.keys
    )
    title = f"### {section.path}\n\n" if section.path else ""
    return f"{title}{section.help}\n\n| key | values | default | |\n| --- | --- | --- | --- |\n{rows}\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
