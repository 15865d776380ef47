"""Comparisons end to end: runs, going on, failures, leaving, and finished runs."""

import json
import os
import signal
from concurrent.futures import Executor, Future
from html import escape
from pathlib import Path

import numpy as np
import pytest

import bnfinetune as bnf
from bnfinetune.cli import main
from bnfinetune.comparison import race as race_module
from bnfinetune.comparison import runs as runs_module
from bnfinetune.comparison.budget import Budget
from bnfinetune.comparison.disagreement import Disputed, class_shares, disputed, pictures
from bnfinetune.comparison.race import compare, compare_runs
from bnfinetune.errors import CheckpointError, RecipeError
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.data.splits import load_splits
from bnfinetune.training.measuring.outcomes import read_outcomes
from tests.training.loop.test_guard import settings
from tests.training.support import write_images


class Direct(Executor):
    """Does what it is asked at once, in this process."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("compare") / "images", train=6, val=6)


def cells(images, **more):
    options = settings(images, "unused", **{"train.epochs": 1, **more})
    del options["run.dir"]
    nested = {key: value for key, value in options.items() if not key.startswith("run.seed")}
    return {"frozen": {"base": "freeze_bn", **nested}, "live": {"base": "full", **nested}}


def plain(images, **more):
    """Cells as plain text, whatever the values are."""
    return {
        name: {key: str(value) if isinstance(value, Path) else value for key, value in cell.items()}
        for name, cell in cells(images, **more).items()
    }


def compared(images, out, **options):
    said = []
    found = compare(plain(images), out=out, executor=Direct(), say=said.append, **options)
    return found, said


def test_cells_are_ordinary_runs_and_their_result_is_what_these_say(images, tmp_path):
    found, said = compared(images, tmp_path / "out", seeds=2)
    assert {cell.name for cell in found.cells} == {"frozen", "live"}
    assert len(said) == 5
    for cell in found.cells:
        for seed, run in cell.runs.items():
            folder = tmp_path / "out" / cell.name / f"seed-{seed}"
            alone = bnf.finetune(str(folder / "recipe.yaml"), **{"run.dir": tmp_path / f"{cell.name}{seed}"})
            assert run.numbers["after"]["validation"] == alone.after["validation"].scalars()
            right = read_outcomes(folder)["validation"].right
            assert right.mean() == pytest.approx(run.numbers["after"]["validation"]["top1"])
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert saved == json.loads(json.dumps(found.to_dict()))
    means = [np.mean(cell["validation"]) for cell in saved["cells"]]
    assert means == sorted(means, reverse=True)
    assert saved["winner"] == saved["cells"][0]["name"]
    difference = saved["cells"][1]["behind_winner"]
    assert difference["mean"] == pytest.approx(means[1] - means[0])
    assert f"{100 * difference['mean']:+.1f} [" in str(found)
    recipe = found.command.removeprefix("bnfinetune recipe=")
    assert load_recipe(recipe).bn.train_stats == {"frozen": "running", "live": None}[found.winner.name]


def test_the_same_command_goes_on_and_repeats_nothing(images, tmp_path, monkeypatch):
    whole, _ = compared(images, tmp_path / "whole", seeds=2)
    original, made = runs_module.finetune, []

    def broken_off(recipe, **options):
        made.append(options["run.dir"])
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(recipe, **options)

    monkeypatch.setattr(runs_module, "finetune", broken_off)
    with pytest.raises(KeyboardInterrupt):
        compared(images, tmp_path / "parts", seeds=2)
    parts, _ = compared(images, tmp_path / "parts", seeds=2)
    assert len(made) == 5  # the third is made again
    for one, other in zip(whole.cells, parts.cells, strict=True):
        assert one.scores("validation", "top1") == other.scores("validation", "top1")
        assert one.scores("validation", "loss") == other.scores("validation", "loss")
    with pytest.raises(CheckpointError, match="holds a comparison of other cells"):
        compare(plain(images, **{"optim.lr": 0.5}), out=tmp_path / "parts", executor=Direct())


def test_a_cell_that_fails_does_not_end_the_others(images, tmp_path):
    broken = {**plain(images), "broken": {**plain(images)["live"], "optim.name": "no_such"}}
    found = compare(broken, out=tmp_path / "out", seeds=2, executor=Direct(), say=lambda _: None)
    last = found.cells[-1]
    assert (last.name, last.runs) == ("broken", {})
    assert "timm has no optimizer" in last.error
    assert "broken failed: seed 0: " in str(found)
    assert len(found.cells[0].runs) == 2
    alone = {"a": broken["broken"], "b": {**broken["broken"], "optim.lr": 0.1}}
    with pytest.raises(CheckpointError, match="no run of this comparison is over: seed 0"):
        compare(alone, out=tmp_path / "none", seeds=1, executor=Direct(), say=lambda _: None)


def test_cells_leave_once_they_are_surely_behind(images, tmp_path, monkeypatch):
    asked = []

    def leaving(outcomes, **options):
        asked.append((sorted(outcomes), [len(seeds) for seeds in outcomes.values()], options["rounds"]))
        return {"frozen": None}

    monkeypatch.setattr(race_module, "still_racing", leaving)
    found, said = compared(images, tmp_path / "out", seeds=3)
    assert asked == [(["frozen", "live"], [2, 2], 1)]
    seeds = {cell.name: (len(cell.runs), cell.left_after) for cell in found.cells}
    assert seeds == {"frozen": (3, None), "live": (2, 2)}
    assert "live is surely behind, and leaves" in said
    assert found.winner.name == "frozen"
    assert "live left after 2 seeds" in str(found)
    everything, _ = compared(images, tmp_path / "out", seeds=3, race=False)
    assert all(len(cell.runs) == 3 for cell in everything.cells)


def test_a_budget_that_is_spent_begins_no_round(images, tmp_path):
    first, _ = compared(images, tmp_path / "out", seeds=1)
    numbers = [cell.runs[0].numbers for cell in first.cells]
    used = {key: sum(each[key] for each in numbers) for key in ("updates", "images")}
    budgets = {f"{used['images']} images": 1, "0.0001 minutes": 1, f"{used['updates'] + 1} updates": 2}
    for budget, seeds in budgets.items():
        found, said = compared(images, tmp_path / "out", seeds=3, race=False, budget=budget)
        assert all(len(cell.runs) == seeds for cell in found.cells)
        assert f"the budget of {budget} is spent: no further round of seeds is made" in said


@pytest.mark.parametrize("text", ["30", "minutes", "-1 minutes", "0 updates", "nan images", "3 hours", "inf images"])
def test_a_budget_of_other_words_is_refused(text):
    with pytest.raises(RecipeError, match="budget: found .* allowed: '30 minutes'"):
        Budget.of(text)


def test_cells_may_leave_after_one_seed_where_that_is_asked_for(images, tmp_path, monkeypatch):
    monkeypatch.setattr(race_module, "still_racing", lambda outcomes, **options: {"frozen": options})
    found, _ = compared(images, tmp_path / "out", seeds=2, least_seeds=1)
    assert {cell.name: (len(cell.runs), cell.left_after) for cell in found.cells} == {
        "frozen": (2, None),
        "live": (1, 1),
    }


def test_the_page_tells_what_the_result_does(images, tmp_path):
    varied = {f"{name}{lr:g}": {**cell, "optim.lr": lr} for name, cell in plain(images).items() for lr in (1e-3, 5e-2)}
    found = compare(varied, out=tmp_path / "out", seeds=2, executor=Direct(), say=lambda _: None, race=False)
    text = (tmp_path / "out" / "comparison.html").read_text()
    for cell in found.cells:
        assert f'<th scope="row">{cell.name}</th>' in text
    assert escape(found.command) in text
    assert text.count("<h2") == 7 - (not disputed(found.cells))
    for key in ("By optim.lr", "How sure", "Classes"):
        assert f">{key}</h2>" in text
    assert "By run.seed" not in text


def test_classes_and_images_of_dispute_are_those_of_the_outcomes(images, tmp_path):
    found, _ = compared(images, tmp_path / "out", seeds=2)
    one, other = found.cells
    shares = class_shares(found.cells)
    labels = one.runs[0].outcomes["validation"].label
    for number, name in enumerate(one.runs[0].class_names):
        for place, cell in enumerate((one, other)):
            right = [cell.runs[seed].outcomes["validation"].right[labels == number] for seed in (0, 1)]
            assert shares[name][place] == pytest.approx(np.concatenate(right).mean())
    split = load_splits(load_recipe(plain(images)["live"]).data, 0)
    recipe, names = load_recipe(plain(images)["live"]), [cell.name for cell in found.cells]
    image = Disputed(0, 0, int(split.val[0]["label"]), (1.0, 0.0))
    (shown,) = pictures([image], names, recipe, one.runs[0].class_names)
    assert shown.title == one.runs[0].class_names[image.label]
    assert shown.lines == (f"right: {names[0]}", f"wrong: {names[1]}")
    for image in disputed(found.cells):
        assert {0.0, 1.0} == set(image.right)  # of two seeds, most are both
        assert split.val[image.row]["label"] == image.label
        for cell, right in zip(found.cells, image.right, strict=True):
            outcomes = [cell.runs[seed].outcomes["validation"] for seed in (0, 1)]
            assert [float(each.right[each.row.tolist().index(image.row)]) for each in outcomes] == [right] * 2


def test_finished_runs_are_compared(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for recipe in ("full", "freeze_bn"):
        for seed in (0, 1):
            bnf.finetune(recipe, **settings(images, f"{recipe}{seed}", **{"train.epochs": 1, "run.seed": seed}))
    capsys.readouterr()
    assert main(["compare", "full0", "full1", "freeze_bn0", "freeze_bn1"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 4
    assert "the best on validation: bnfinetune recipe=" in said
    bnf.finetune("full", **settings(images, "faster", **{"train.epochs": 1, "run.seed": 0, "optim.lr": 0.02}))
    found = compare_runs(["full0", "freeze_bn0", "faster"])
    rate = load_recipe("full0/recipe.yaml").optim.lr
    assert {cell.name for cell in found.cells} == {"freeze_bn", f"full, optim.lr={rate}", "full, optim.lr=0.02"}
    with pytest.raises(RecipeError, match="two cells or more"):
        compare_runs(["full0", "full1"])
    with pytest.raises(CheckpointError, match="nowhere is not a run folder"):
        compare_runs(["full0", "nowhere"])


def killed_once(recipe, **options):
    """A run whose process is killed at its first try."""
    marker = Path(f"{options['run.dir']}.killed")
    if not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return bnf.finetune(recipe, **options)


def make_killed_once(recipe, folder):
    runs_module.finetune = killed_once
    return runs_module.make_run(recipe, folder)


@pytest.mark.slow
def test_processes_that_are_killed_are_started_again(images, tmp_path, monkeypatch):
    whole, _ = compared(images, tmp_path / "whole", seeds=1)
    monkeypatch.setattr(runs_module, "make_run", make_killed_once)
    found = compare(plain(images), out=tmp_path / "out", seeds=1, jobs=2, say=lambda _: None)
    for one, other in zip(whole.cells, found.cells, strict=True):
        assert one.scores("validation", "loss") == other.scores("validation", "loss")
