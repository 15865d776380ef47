"""The page of a comparison, `comparison.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from bnfinetune.comparison import figures
from bnfinetune.comparison.disagreement import class_shares, disputed, pictures
from bnfinetune.comparison.result import Compared, Comparison, outlook
from bnfinetune.diagnose.page import Drawing, Grid, Page, Part
from bnfinetune.diagnose.run_report import SHARES
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import diff_recipes, load_recipe
from bnfinetune.training.saving.timm_folder import RECIPE

_CLASSES = 12


def comparison_page(found: Comparison, title: str, notes: Sequence[str] = ()) -> Page:
    """What came of a comparison, for people.

    Args:
        found: It.
        title: Of the page.
        notes: What else was decided, a line each, shown first.
    """
    best, cells = found.winner, [cell for cell in found.cells if cell.runs]
    parts = [
        *([Part("How it was decided", points=tuple(notes))] if notes else []),
        _result(found, cells),
        _sureness(found, cells),
        *_keys(cells, found.metric),
        _courses(cells, found.metric),
        *_classes(cells),
        *_images(cells),
        _made(found),
    ]
    runs = [run for cell in cells for run in cell.runs.values()]
    numbers = {
        f"{_named(found.metric)} of the best": _shown(mean(best.scores("validation", found.metric))),
        "runs": f"{len(runs)}",
        "of training": f"{sum(run.numbers['seconds'] for run in runs) / 60:,.1f} min",
    }
    return Page(title, _verdict(found), numbers, tuple(parts))


def _verdict(found: Comparison) -> str:
    best = f"{found.winner.name} is best on validation"
    open_ones = [name for name, each in found.differences.items() if not each.is_behind]
    if not open_ones:
        others = {0: "", 1: f", surely ahead of {next(iter(found.differences), '')}"}
        return best + others.get(len(found.differences), ", surely ahead of all others")
    sure = len(found.differences) - len(open_ones)
    ahead = f", surely ahead of {sure} cell{'s' if sure > 1 else ''}" if sure else ""
    return f"{best}{ahead}, not surely of {' and of '.join(open_ones)}"


def _result(found: Comparison, cells: Sequence[Compared]) -> Part:
    text = (
        "All cells saw the same images, splits, seeds and order of images. Validation chooses, so it flatters the "
        "best a little; no decision looked at the test images, which are shown of the cells that are left."
    )
    header = (*(str(column.header) for column in found.table().columns), "updates", "peak memory")
    rows = tuple((cell.name, *found.row(cell), *_cost(cell)) for cell in found.cells)
    values = {cell.name: cell.scores("validation", found.metric) for cell in cells}
    label = f"validation {_named(found.metric)}"
    drawn = figures.scores(values, label, shares=found.metric in SHARES)
    told = f"{label} of each cell: a dot per seed, a line at the mean; the axis does not begin at zero."
    failed = tuple(f"{cell.name} failed: {cell.error}" for cell in found.cells if cell.error)
    return Part(
        "Result",
        (text,),
        failed,
        command=found.command,
        figures=(Drawing(drawn, told),),
        tables=(Grid("All cells, the best first", header, rows),),
    )


def _cost(cell: Compared) -> tuple[str, str]:
    """Updates of a run, and the most memory of one."""
    numbers = [run.numbers for run in cell.runs.values()]
    if not numbers:
        return "", ""
    peak = max(each["peak_memory_bytes"] for each in numbers)
    return f"{mean(each['updates'] for each in numbers):,.0f}", f"{peak / 2**20:,.0f} MiB"


def _sureness(found: Comparison, cells: Sequence[Compared]) -> Part:
    points = [
        f"{cell.name} left after {cell.left_after} seeds, surely behind the leader" for cell in cells if cell.left_after
    ]
    points += [line for cell in cells if cell.name in found.differences and (line := outlook(found, cell))]
    told = "Paired by image and seed. An interval that holds 0 leaves open which of the two is better."
    known = found.differences
    drawn = (Drawing(figures.differences(known), "Share of validation images that are right, in points."),)
    return Part("How sure", (told,), tuple(points), figures=drawn if known else ())


def _keys(cells: Sequence[Compared], metric: str) -> list[Part]:
    """The metric against each key whose numbers differ between cells that are alike otherwise."""
    recipes = {cell.name: _recipe(cell) for cell in cells}
    scores = {cell.name: mean(cell.scores("validation", metric)) for cell in cells}
    parts: list[Part] = []
    for key, values in _varied(recipes).items():
        groups: list[list[str]] = []
        for name, recipe in recipes.items():
            group = next((each for each in groups if _alike_but_for(key, recipes[each[0]], recipe)), None)
            groups.append([name]) if group is None else group.append(name)
        lines = {
            _common(group, key): sorted((values[name], scores[name]) for name in group)
            for group in groups
            if len(group) > 1
        }
        if not lines:
            continue
        log = min(values.values()) > 0 and max(values.values()) > 4 * min(values.values())
        kept = dict(list(lines.items())[: figures.MOST_LINES])
        axes = key, f"validation {_named(metric)}"
        drawn = figures.lines(kept, f"key-{len(parts)}", axes, shares=metric in SHARES, log=log)
        parts.append(Part(f"By {key}", figures=(Drawing(drawn, f"Mean over seeds against {key}."),)))
    return parts


def _varied(recipes: Mapping[str, Recipe]) -> dict[str, dict[str, float]]:
    """Keys that are numbers in all recipes, and not the same in all: their values by cell."""
    first = next(iter(recipes.values()))
    apart = {name: diff_recipes(first, recipe) for name, recipe in recipes.items()}
    found = {}
    for key in dict.fromkeys(key for keys in apart.values() for key in keys if not key.startswith("run.")):
        here = next(keys[key][0] for keys in apart.values() if key in keys)
        values = {name: keys[key][1] if key in keys else here for name, keys in apart.items()}
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.values()):
            found[key] = values
    return found


def _alike_but_for(key: str, first: Recipe, second: Recipe) -> bool:
    apart = diff_recipes(first, second)
    return all(each in {key, "name"} or each.startswith("run.") for each in apart)


def _common(names: Sequence[str], key: str) -> str:
    """What cells are called that differ in one key."""
    parts = [part for part in names[0].split(", ") if not part.startswith(f"{key}=")]
    return ", ".join(parts) or "mean"


def _courses(cells: Sequence[Compared], metric: str) -> Part:
    """The validation metric of each cell over its updates, the mean of its seeds."""
    found = {}
    for cell in cells[: figures.MOST_LINES]:
        values: dict[int, list[float]] = {}
        for run in cell.runs.values():
            for record in run.history:
                values.setdefault(record["update"], []).append(record[metric])
        found[cell.name] = [(update, mean(each)) for update, each in sorted(values.items())]
    axes = "optimizer updates", f"validation {_named(metric)}"
    drawn = figures.lines(found, "courses", axes, shares=metric in SHARES, log=False)
    left_out = f" The first {figures.MOST_LINES} cells." if len(cells) > figures.MOST_LINES else ""
    told = f"Measured on the validation images from before the first update on, the mean over seeds.{left_out}"
    return Part("Over the runs", figures=(Drawing(drawn, told),))


def _classes(cells: Sequence[Compared]) -> list[Part]:
    shares = class_shares(cells)
    if not shares:
        return []
    rows = tuple((name, *map(_shown, values)) for name, values in list(shares.items())[:_CLASSES])
    table = Grid(
        "Share of its validation images that are right, over all seeds; where cells differ most, first",
        ("class", *(cell.name for cell in cells)),
        rows,
    )
    return [Part("Classes", tables=(table,))]


def _images(cells: Sequence[Compared]) -> list[Part]:
    images, first = disputed(cells), next(iter(cells[0].runs.values()))
    if not images:
        return []
    names = [cell.name for cell in cells]
    shown = pictures(images, names, _recipe(cells[0]), first.class_names)
    text = "Validation images that one cell has right and another wrong, over the seeds that all have in common."
    return [Part("Where they disagree", (text,), pictures=tuple(shown))] if shown else []


def _made(found: Comparison) -> Part:
    rows = tuple((cell.name, " ".join(cell.words)) for cell in found.cells)
    return Part("How it was made", tables=(Grid("The cells", ("cell", "as it is written"), rows, (1,)),))


def _recipe(cell: Compared) -> Recipe:
    return load_recipe(str(next(iter(cell.runs.values())).folder / RECIPE))


def _named(metric: str) -> str:
    return SHARES.get(metric, metric)


def _shown(value: float) -> str:
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.3f}"
