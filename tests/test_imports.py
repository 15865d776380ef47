"""Imports within the package: without circles, and down from room to room."""

import ast
import graphlib
from pathlib import Path

import bnfinetune

PACKAGE = Path(bnfinetune.__file__).parent

# From the lowest up. A module may import from its own row and from those above it in this list.
ROOMS = (
    "errors machine notes source_paths",
    "bn.class_change bn.class_probe bn.functional bn.layers bn.population bn.put_back bn.saved_report bn.tensor_hash",
    "bn.policy",
    "bn.statistics bn.folding",
    "bn.absorb bn.adapt bn.average bn.convert bn.patch",
    "bn",
    "recipe recipe_files recipe_hints recipe_json_schema recipe_keys recipe_mistakes recipe_text demo",
    "diagnose",
    "training",
    "inference",
    "export",
    "integrations",
    "comparison",
    "cli cli_completion cli_help cli_lookup cli_tasks cli_verbs cli_words __main__",
    "__init__",
)
RANKS = {room: rank for rank, row in enumerate(ROOMS) for room in row.split()}


def imports_of(package: Path) -> dict[str, set[str]]:
    """What every module of a package imports of it, by names without the package's own.

    Imports in functions and for type checkers count like any others.
    """
    files = {_name(path.relative_to(package.parent)): path for path in package.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        named: list[str] = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} imports by a relative name"
                members = [f"{node.module}.{alias.name}" for alias in node.names]
                named += [member if member in files else str(node.module) for member in members]
        found[_inner(name)] = {_inner(each) for each in named if each in files}
    return found


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _inner(module: str) -> str:
    return module.partition(".")[2] or "__init__"


def circle_in(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty if there is none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def upward_in(imports: dict[str, set[str]]) -> list[str]:
    return [f"{a} -> {b}" for a, named in imports.items() for b in sorted(named) if rank(a) < rank(b)]


def rank(module: str) -> int:
    parts = module.split(".")
    rooms = [room for n in range(len(parts), 0, -1) if (room := ".".join(parts[:n])) in RANKS]
    assert rooms, f"bnfinetune.{module} has no place in ROOMS"
    assert rooms[0] != "bn" or module == "bn", f"bnfinetune.{module} has no place in ROOMS"
    return RANKS[rooms[0]]


def test_no_module_imports_itself_by_way_of_others():
    assert not circle_in(imports_of(PACKAGE))


def test_imports_go_down_only():
    assert not upward_in(imports_of(PACKAGE))


def test_circles_are_seen_wherever_the_import_stands(tmp_path):
    package = tmp_path / "bnfinetune"
    (package / "bn").mkdir(parents=True)
    sources = {
        "__init__": "from bnfinetune.bn.layers import a",
        "bn/__init__": "",
        "bn/layers": "import typing\nif typing.TYPE_CHECKING:\n    from bnfinetune.bn import population",
        "bn/population": "def f():\n    import bnfinetune.bn.functional",
        "bn/functional": "from bnfinetune.bn.layers import a",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    imports = imports_of(package)
    assert imports == {
        "__init__": {"bn.layers"},
        "bn": set(),
        "bn.layers": {"bn.population"},
        "bn.population": {"bn.functional"},
        "bn.functional": {"bn.layers"},
    }
    circle = circle_in(imports)
    assert circle[0] == circle[-1]
    assert set(circle) == {"bn.layers", "bn.population", "bn.functional"}


def test_an_import_upwards_is_named():
    assert upward_in({"bn.policy.apply": {"bn.layers", "bn.folding.fold"}}) == ["bn.policy.apply -> bn.folding.fold"]
    assert upward_in({"diagnose.watch": {"training.run"}, "cli": {"training.run"}}) == [
        "diagnose.watch -> training.run"
    ]
