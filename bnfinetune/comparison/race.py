"""A comparison from its cells to its result: rounds of seeds, out of which cells leave that are surely behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bnfinetune.comparison.budget import Budget
from bnfinetune.comparison.cells import Cell, written
from bnfinetune.comparison.page import comparison_page
from bnfinetune.comparison.paired import still_racing
from bnfinetune.comparison.result import Compared, Comparison, Finished, on_same_images, outcomes_of
from bnfinetune.comparison.runs import Job, local_processes, make_all
from bnfinetune.errors import CheckpointError, RecipeError
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import diff_recipes, dump_recipe, load_recipe
from bnfinetune.training.saving.atomic import write_json, write_text
from bnfinetune.training.saving.timm_folder import RECIPE

PLAN, RESULT, PAGE = "plan.json", "comparison.json", "comparison.html"


def compare(
    cells: Sequence[Cell] | Mapping[str, str | Mapping[str, Any] | Recipe],
    *,
    seeds: int | Sequence[int] = 3,
    out: str | Path = "runs/comparison",
    jobs: int = 1,
    race: bool = True,
    least_seeds: int = 2,
    budget: str | None = None,
    executor: Executor | None = None,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Compare recipes on the same images, splits, seeds and order; called again with the same `out`, it goes on.

    Every cell and seed is an ordinary run, under `out`. After the second seed and each later one, cells leave that are
    surely behind the leader (`still_racing`). Validation chooses; the test split is shown of those that are left. The
    result is written to `out` as comparison.json, and as a page, comparison.html.

    Args:
        cells: Recipes by name, in any form that `finetune` takes, or what `cells_of` gives.
        seeds: Seeds 0, 1, ... of each cell, a round of all cells each; or which ones.
        out: The folder of the comparison.
        jobs: Runs at a time on this machine, each in a process with a device of its own.
        race: Whether cells may leave.
        least_seeds: After which cells may leave; 1 trusts the images alone, whatever a seed does.
        budget: After which no new round begins: `30 minutes` of training, `2000 updates` or `50000 images`, of all
            runs together. The runs of a round are always all made, or they could not be paired.
        executor: Where to make the runs instead; its workers must see `out` and the data.
        say: Told what happens.

    Raises:
        RecipeError: The cells are no comparison.
        CheckpointError: `out` holds another comparison, or no run came to its end.
    """
    folder = Path(out)
    planned = cells if isinstance(cells, Sequence) else [_cell(name, recipe, folder) for name, recipe in cells.items()]
    metric = _one_metric([cell.recipe for cell in planned])
    limit = None if budget is None else Budget.of(budget)
    _plan(folder, planned)
    compared = {cell.name: Compared(cell.name, cell.words) for cell in planned}
    pool: Callable[[], Any] = partial(local_processes, jobs) if executor is None else partial(_kept_open, executor)
    order = range(seeds) if isinstance(seeds, int) else seeds
    for number, seed in enumerate(order):
        due = [cell for cell in planned if compared[cell.name].left_after is None and not compared[cell.name].error]
        if not due:
            break
        if limit is not None and number and limit.is_spent(_numbers(compared.values())):
            say(f"the budget of {limit} is spent: no further round of seeds is made")
            break
        _make_round(due, seed, folder, compared, pool, say)
        if race and least_seeds <= number + 1 < len(order):
            _let_leave(compared, rounds=len(order) - least_seeds, say=say)
    found = Comparison.of(list(compared.values()), metric)
    write_json(folder / RESULT, found.to_dict())
    write_text(folder / PAGE, comparison_page(found, _title(planned)).html())
    say(f"a page to look at: {folder / PAGE}")
    return found


def compare_runs(folders: Sequence[str]) -> Comparison:
    """Compare finished runs; those that differ in their seed alone are one cell.

    Raises:
        CheckpointError: One is not the folder of a finished run, or they were validated on other images.
        RecipeError: They are all of one recipe.
    """
    recipes = {path: load_recipe(str(_recipe_file(path))) for path in folders}
    groups: dict[str, list[str]] = {}
    for path, recipe in recipes.items():
        groups.setdefault(dump_recipe(_without_run(recipe)), []).append(path)
    alone = [recipes[paths[0]] for paths in groups.values()]
    cells = []
    for paths, name in zip(groups.values(), _names(alone), strict=True):
        cell = Compared(name, (f"recipe={_recipe_file(paths[0])}",))
        cell.runs = {recipes[path].run.seed: Finished.of(Path(path)) for path in paths}
        cells.append(cell)
    if len(cells) < 2:
        raise RecipeError("a comparison is of two cells or more; these runs are all of one recipe")
    return Comparison.of(cells, _one_metric(alone))


def _names(recipes: Sequence[Recipe]) -> list[str]:
    """What recipes are called; those of one name, by the keys in which they differ."""
    names = []
    for recipe in recipes:
        apart: dict[str, Any] = {}
        for other in recipes:
            if other.name == recipe.name:
                apart |= {key: mine for key, (mine, _) in diff_recipes(recipe, other).items()}
        told = [f"{key}={written(value)}" for key, value in apart.items() if not key.startswith("run.")]
        names.append(", ".join([recipe.name, *told]))
    return names


def _cell(name: str, recipe: str | Mapping[str, Any] | Recipe, folder: Path) -> Cell:
    cell = Cell(name, (f"recipe={recipe}",), load_recipe(recipe))
    if isinstance(recipe, str):
        return cell
    return replace(cell, words=(f"recipe={folder / cell.folder / 'seed-0' / RECIPE}",))  # where a run will write it


def _one_metric(recipes: Sequence[Recipe]) -> str:
    metrics = dict.fromkeys(recipe.best_metric for recipe in recipes)
    if len(metrics) != 1:
        found = f"several checkpoint.metric ({', '.join(metrics)})" if metrics else "no cell"
        raise RecipeError(f"cells are compared by one metric; found {found}")
    return next(iter(metrics))


def _plan(folder: Path, cells: Sequence[Cell]) -> None:
    """Write down what is compared, or see that it is what the folder holds."""
    plan = {cell.name: cell.recipe.model_dump(mode="json") for cell in cells}
    path = folder / PLAN
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != plan:
            raise CheckpointError(f"out={folder} holds a comparison of other cells; choose another folder")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"out={folder} is not empty and holds no comparison; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


def _make_round(
    cells: Sequence[Cell],
    seed: int,
    folder: Path,
    compared: Mapping[str, Compared],
    pool: Callable[[], Executor],
    say: Callable[[str], None],
) -> None:
    """The runs of one seed."""
    jobs = []
    metric = cells[0].recipe.best_metric
    for cell in cells:
        seeded = cell.recipe.run.model_copy(update={"seed": seed})
        recipe = cell.recipe.model_copy(update={"run": seeded}).model_dump(mode="json")
        jobs.append(Job(cell.name, recipe, folder / cell.folder / f"seed-{seed}"))
    begin = time.perf_counter()
    with tqdm(total=len(jobs), unit="run", leave=False, disable=None, dynamic_ncols=True) as bar:

        def look() -> None:
            running = {job.cell: job.newest for job in jobs if not job.is_done}
            told = [f"{cell} update {at['update']}, {metric} {at[metric]:.3f}" for cell, at in running.items() if at]
            bar.set_postfix_str("; ".join(told))

        for number, (job, error) in enumerate(make_all(jobs, pool, look), start=1):
            if error is not None:
                compared[job.cell].error = f"seed {seed}: {error}"
                outcome = error
            else:
                run = compared[job.cell].runs[seed] = Finished.of(job.folder)
                outcome = f"validation {metric} {run.numbers['after']['validation'][metric]:.3f}"
            bar.update()
            with bar.external_write_mode():
                say(f"seed {seed}  {number}/{len(jobs)}  {job.cell}  {outcome}  ({time.perf_counter() - begin:.0f} s)")


def _let_leave(compared: Mapping[str, Compared], rounds: int, say: Callable[[str], None]) -> None:
    racing = {name: cell for name, cell in compared.items() if cell.left_after is None and not cell.error}
    if len(racing) < 2:
        return
    outcomes = {name: outcomes_of(cell) for name, cell in racing.items()}
    staying = still_racing(outcomes, same_images=on_same_images(list(racing.values())), rounds=rounds)
    for name in racing.keys() - staying.keys():
        compared[name].left_after = len(racing[name].runs)
        say(f"{name} is surely behind, and leaves")


def _title(cells: Sequence[Cell]) -> str:
    about = {(cell.recipe.model.name, cell.recipe.data.source) for cell in cells}
    where = "; ".join(f"{model} on {source}" for model, source in sorted(about))
    return f"{len(cells)} ways to fine-tune {where}"


def _numbers(cells: Iterable[Compared]) -> Iterator[dict[str, Any]]:
    return (run.numbers for cell in cells for run in cell.runs.values())


def _kept_open(executor: Executor) -> AbstractContextManager[Executor]:
    """The caller's own executor, which is theirs to close."""
    return nullcontext(executor)


def _recipe_file(folder: str) -> Path:
    path = Path(folder) / RECIPE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run folder: it holds no {RECIPE}")
    return path


def _without_run(recipe: Recipe) -> Recipe:
    """A recipe without what tells a run of it from another."""
    plain = Recipe()
    train = recipe.train.model_copy(update={"resume": None, "resume_allow": ()})
    return recipe.model_copy(update={"run": plain.run, "train": train})
