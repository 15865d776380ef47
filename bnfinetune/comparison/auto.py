"""`recipe=auto`: look at network and images, train the advised recipe and its best rival, keep the better.

Candidates are trained in full, not for a few epochs: short runs prefer what starts well, such as a fitted head, by more
than the recipes differ in the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfinetune.comparison.cells import Cell, written
from bnfinetune.comparison.look import Look, look
from bnfinetune.comparison.page import comparison_page
from bnfinetune.comparison.race import compare
from bnfinetune.comparison.result import Comparison, Finished, difference_of
from bnfinetune.diagnose.drift_report import BATCH_SIZES
from bnfinetune.diagnose.recommend import FEW_IMAGES, MEASURED, Situation, recommend, tells_ruin
from bnfinetune.errors import RecipeError
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import diff_recipes, dump_recipe, load_recipe
from bnfinetune.training.saving.atomic import write_json, write_text

SURE = 0.8
"""Level of the interval by which a rival must be ahead of the advised recipe: one chance in ten that it only seems so.
Recipes that are left differ by a point or two as a rule, which no small validation split can tell; what is to be found
is advice that fails."""


@dataclass(frozen=True)
class Found:
    """What `finetune_auto` gave.

    Attributes:
        folder: Of the search; `best` in it is the network, ready for `evaluate`, `predict` and others.
        recipe: That was the best.
        reasons: How it was found, a sentence each.
        comparison: Of what was trained.
        run: The one whose network was kept.
    """

    folder: Path
    recipe: Recipe
    reasons: tuple[str, ...]
    comparison: Comparison
    run: Finished


def finetune_auto(recipe: str | Mapping[str, Any] | Recipe = "auto", /, **overrides: Any) -> Found:
    """Find the recipe that is best on these images, and fine-tune by it: `bnfinetune recipe=auto [overrides]`.

    Args:
        recipe: The name of a shipped recipe, the path of a YAML file, a nested mapping, or a `Recipe`, with
            `auto.recipes`.
        overrides: Values that differ, under dotted keys or as nested mappings; they hold for every candidate.

    Returns:
        The best network's folder, its recipe, and how it was found. Called again with the same `run.dir`, it goes on.

    Raises:
        BnFinetuneError: One of its children, with one line that names the key or file and the remedy.
    """
    return train_auto(load_recipe(recipe, overrides))


def train_auto(recipe: Recipe, say: Callable[[str], None] = print, executor: Executor | None = None) -> Found:
    """`finetune_auto` for a complete recipe; `say` is told each decision as it falls, `executor` makes the runs.

    Raises:
        BnFinetuneError: As `finetune_auto`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            f"recipe={recipe.name} compares in one process: find the recipe with `bnfinetune recipe={recipe.name}`, "
            "and launch the one that it names on all processes"
        )
    folder = Path(recipe.run.dir or f"runs/{recipe.name}")
    reasons: list[str] = []

    def decide(line: str) -> None:
        reasons.append(line)
        say(f"auto   {line}")

    asked = _asked(recipe)
    cells = _candidates(recipe, asked)
    seen = look(load_recipe({**asked, "name": recipe.name}), folder)
    for line in seen.lines():
        decide(line)
    left = worth_trying(cells, seen, decide)
    tried, beyond = left[: recipe.auto.budget + 1], left[recipe.auto.budget + 1 :]
    over = f"; beyond auto.budget={recipe.auto.budget}: {_names(beyond)}" if beyond else ""
    decide(f"trained in full: {_names(tried)}{over}")
    found = compare(
        tried,
        seeds=[recipe.run.seed],
        out=folder / "runs",
        race=False,
        executor=executor,
        say=lambda line: say(f"       {line}"),
    )
    chosen, why = choice(found, tried)
    decide(why)
    kept = next(cell for cell in found.cells if cell.name == chosen.name).runs[recipe.run.seed]
    _keep(folder, found, chosen, kept, reasons)
    say(f"{found}\nbest network, by recipe={chosen.name}: {folder / 'best'}")
    say(f"a page to look at: {folder / 'report.html'}")
    return Found(folder, chosen.recipe, tuple(reasons), found, kept)


def _asked(recipe: Recipe) -> dict[str, Any]:
    """What a recipe sets for all candidates, by dotted key.

    Raises:
        RecipeError: It sets what they are to differ in.
    """
    given = {key: new for key, (_, new) in diff_recipes(Recipe(), recipe).items()}
    if "name" in recipe.model.model_fields_set:  # also the demo's, which differs from no default but stands for photos
        given["model.name"] = recipe.model.name
    own = [key for key in given if key.partition(".")[0] in ("bn", "recalibrate")]
    if own:
        raise RecipeError(f"{own[0]}: what recipe={recipe.name} is to find; give it to a recipe of auto.recipes")
    return {key: value for key, value in given.items() if key.partition(".")[0] not in ("auto", "name")}


def _candidates(recipe: Recipe, asked: Mapping[str, Any]) -> list[Cell]:
    """Each recipe of `auto.recipes`, with what is asked for besides.

    Raises:
        RecipeError: There is none, or one compares others itself.
    """
    if not recipe.auto.recipes:
        raise RecipeError(f"auto.recipes: recipe={recipe.name} names no recipes to find the best of")
    shown = [f"{key}={written(value)}" for key, value in asked.items() if not key.startswith("run.")]
    cells = [Cell(name, (f"recipe={name}", *shown), load_recipe(name, asked)) for name in recipe.auto.recipes]
    for cell in cells:
        if cell.recipe.auto.recipes:
            raise RecipeError(f"auto.recipes: {cell.name} compares others itself; name recipes that train")
    return cells


def _without_bn(cells: Sequence[Cell]) -> list[Cell]:
    """Candidates for a network that has no BN, those first that ask for none."""
    plain = Recipe()
    found = []
    for cell in cells:
        recipe = cell.recipe.model_copy(update={"bn": plain.bn, "recalibrate": plain.recalibrate})
        undone = diff_recipes(cell.recipe, recipe)
        words = (*cell.words, *(f"{key}={written(value)}" for key, (_, value) in undone.items()))
        found.append((len(undone), Cell(cell.name, words, recipe)))
    return [cell for _, cell in sorted(found, key=lambda pair: pair[0])]


def worth_trying(cells: Sequence[Cell], seen: Look, decide: Callable[[str], None]) -> list[Cell]:
    """The candidates of which something is to be expected, the advised one first; `decide` is told who leaves, and why.

    On sets larger than those on which fixed statistics were measured to be ahead, those of the batch come next.

    Args:
        cells: All of them.
        seen: Of network and images.
        decide: Told of each that is left out.
    """
    left: list[Cell] = []
    for cell in cells if seen.bn_layers else _without_bn(cells):
        why = _why_not(cell.recipe, seen) or _same_as(cell, left, seen)
        if why is None:
            left.append(cell)
        else:
            decide(f"{cell.name} is not tried: {why}")
    if not left:
        raise RecipeError("auto.recipes: none of them can train this network on these images; name others")
    if not seen.bn_layers:
        return left
    advised = recommend(_situation(cells[0].recipe, seen)).recipe
    enough = seen.training_images is None or seen.training_images > MEASURED

    def place(cell: Cell) -> tuple[bool, bool]:
        return cell.name != advised, not (enough and _is_live(cell.recipe))

    return sorted(left, key=place)


def _why_not(recipe: Recipe, seen: Look) -> str | None:
    """Why nothing is to be expected of a candidate, by pitfalls that need no measuring."""
    if not seen.bn_layers:
        return None  # nothing that needs no measuring is known of these
    live = _is_live(recipe)
    if live and recipe.train.batch_size < FEW_IMAGES and not seen.untouched:
        return f"{recipe.train.batch_size} images per statistic are fewer than {FEW_IMAGES}, and fixed ones are there"
    if not live and seen.untouched and "start" not in recipe.recalibrate.at:
        return "it would keep statistics of construction"
    return None


def _is_live(recipe: Recipe) -> bool:
    """Whether training normalises by statistics of the batch."""
    return any(section.train_stats != "running" for section in recipe.bn_sections)


def _same_as(cell: Cell, others: Sequence[Cell], seen: Look) -> str | None:
    """Whether a candidate comes to the same as one before it, on this network and these images."""
    for other in others:
        if _essence(cell.recipe, seen) == _essence(other.recipe, seen):
            return f"here it is the same as {other.name}"
    return None


def _essence(recipe: Recipe, seen: Look) -> str:
    """A recipe without what makes no difference here."""
    plain = Recipe()
    unmoved = seen.readout is not None and seen.readout.best == 0
    kept = plain.recalibrate if unmoved and recipe.recalibrate.prior == "auto" else recipe.recalibrate
    return dump_recipe(recipe.model_copy(update={"name": "any", "run": plain.run, "recalibrate": kept}))


def _situation(recipe: Recipe, seen: Look) -> Situation:
    return Situation(
        batch_size=recipe.train.batch_size,
        training_images=seen.training_images,
        smallest_sound_batch=BATCH_SIZES[0],
        untrained=seen.untouched,
        ruined=seen.readout is not None and tells_ruin(seen.readout),
    )


def _names(cells: Sequence[Cell]) -> str:
    return ", ".join(cell.name for cell in cells)


def choice(found: Comparison, cells: Sequence[Cell]) -> tuple[Cell, str]:
    """The cell to keep, and why: the first unless another is ahead of it by more than chance."""
    by_name = {cell.name: cell for cell in cells}
    runs = {cell.name: cell.runs for cell in found.cells if cell.runs}
    scores = ", ".join(
        f"{each.name} {each.scores('validation', found.metric)[0]:.3f}" for each in found.cells if each.runs
    )
    told = f"validation {found.metric}: {scores}"
    advised, best = cells[0].name, found.winner.name
    if advised == best:
        return by_name[best], f"{told}; the best is what is advised"
    if advised not in runs:
        return by_name[best], f"{told}; {advised}, which is advised, failed"
    apart = difference_of(runs[advised], runs[best], level=SURE)
    numbers = f"{100 * apart.mean:+.1f} points, {SURE:.0%} interval {100 * apart.low:+.1f} to {100 * apart.high:+.1f}"
    if apart.is_behind:
        return by_name[best], f"{told}; {advised}, which is advised, is behind by more than chance ({numbers})"
    return by_name[advised], f"{told}; {advised}, which is advised, is not behind by more than chance ({numbers})"


def _keep(folder: Path, found: Comparison, chosen: Cell, run: Finished, reasons: Sequence[str]) -> None:
    """Put the best network, the page and the decisions where those of an ordinary run lie."""
    fresh = folder / "best.new"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(run.folder / "best", fresh)
    shutil.rmtree(folder / "best", ignore_errors=True)
    fresh.rename(folder / "best")
    title = f"auto: {chosen.recipe.model.name} on {chosen.recipe.data.source}"
    write_text(folder / "report.html", comparison_page(found, title, reasons).html())
    write_json(folder / "decision.json", {"recipe": chosen.name, "reasons": list(reasons), "run": str(run.folder)})
