"""`recipe=auto`: what it looks at, what it tries, and what it keeps."""

import json
from dataclasses import replace
from filecmp import dircmp

import numpy as np
import pytest

import bnfinetune as bnf
from bnfinetune.cli import main
from bnfinetune.comparison.auto import _asked, choice, train_auto, worth_trying
from bnfinetune.comparison.cells import Cell
from bnfinetune.comparison.look import Look, look
from bnfinetune.comparison.result import Compared, Comparison, Finished
from bnfinetune.diagnose.readout import Readout
from bnfinetune.errors import CheckpointError, RecipeError
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.checkup import check_recipe
from bnfinetune.training.measuring.outcomes import SplitOutcomes
from tests.comparison.test_race import Direct
from tests.training.loop.test_guard import settings
from tests.training.support import write_images

RECIPES = ("precise_then_freeze", "lp_ft", "freeze_bn", "full")
HELPS = Readout(100, {0.0: 0.5, 0.25: 0.6, 0.5: 0.6, 1.0: 0.55}, best=0.25, gain=0.1, doubt=0.02, sureness=5.0)
SEEN = Look("", bn_layers=20, untouched=False, training_images=200, classes=3, readout=HELPS)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("auto") / "images", train=6, val=6)


def auto(images, folder, **more):
    return load_recipe("auto", settings(images, folder, **{"train.epochs": 1, **more}))


def cells(**more):
    return [Cell(name, (f"recipe={name}",), load_recipe(name, more)) for name in RECIPES]


def tried(seen, **more):
    said = []
    return [cell.name for cell in worth_trying(cells(**more), seen, said.append)], said


def test_the_network_that_is_asked_for_is_the_candidates_too():
    """Also the demo's, which is the default where nothing is said, but not on a folder."""
    for name in ("bnf_resnet", "resnet18"):
        asked = _asked(load_recipe("auto", ["data.source=photos", f"model.name={name}"]))
        assert load_recipe("freeze_bn", asked).model.name == name
    assert (
        load_recipe("freeze_bn", _asked(load_recipe("auto", ["data.source=photos"]))).model.name == "resnet50.a1_in1k"
    )
    assert load_recipe("freeze_bn", _asked(load_recipe("auto"))).model.name == "bnf_resnet"


def test_candidates_of_which_something_is_expected_come_in_the_order_of_the_advice():
    assert tried(SEEN) == (["precise_then_freeze", "lp_ft", "freeze_bn", "full"], [])
    few = replace(SEEN, training_images=50)
    assert tried(few)[0][0] == "lp_ft"
    many = replace(SEEN, training_images=5000)
    assert tried(many)[0] == ["precise_then_freeze", "full", "lp_ft", "freeze_bn"]


def test_candidates_leave_that_come_to_the_same_or_cannot_work():
    unmoved = replace(SEEN, readout=HELPS._replace(best=0.0, gain=0.0))
    names, said = tried(unmoved)
    assert names == ["precise_then_freeze", "lp_ft", "full"]
    assert said == ["freeze_bn is not tried: here it is the same as precise_then_freeze"]
    names, said = tried(SEEN, **{"train.batch_size": 2})
    assert names == ["precise_then_freeze", "lp_ft", "freeze_bn"]
    assert said == ["full is not tried: 2 images per statistic are fewer than 8, and fixed ones are there"]
    assert "full" in tried(replace(SEEN, untouched=True), **{"train.batch_size": 2})[0]  # no fixed ones are there
    names, said = tried(replace(SEEN, untouched=True), **{"train.batch_size": 32})
    assert names == ["full", "precise_then_freeze"]
    assert said == [f"{name} is not tried: it would keep statistics of construction" for name in ("lp_ft", "freeze_bn")]


def test_without_bn_recipes_are_tried_without_what_they_say_of_it(images, tmp_path):
    left = worth_trying(cells(), Look("", 0, False, 200, 3, None), lambda _: None)
    assert [cell.name for cell in left] == ["full", "lp_ft"]
    assert left[0].recipe == load_recipe("full")
    name, *overrides = left[1].words
    assert load_recipe(name.removeprefix("recipe="), overrides) == left[1].recipe
    found = train_auto(auto(images, tmp_path / "out", **{"model.name": "test_vit"}), lambda _: None, Direct())
    assert found.reasons[0] == "18 training images, 3 classes; the network has no BN, which plays no part"
    assert {cell.name for cell in found.comparison.cells if cell.runs} == {"full", "lp_ft"}


def ended(name, right, tmp_path):
    outcomes = SplitOutcomes(np.arange(len(right)), right, np.zeros(len(right)), np.zeros(len(right)))
    numbers = {"after": {"validation": {"top1": right.mean()}}}
    return Compared(name, (), {0: Finished(tmp_path, numbers, {"validation": outcomes})})


@pytest.mark.parametrize(("gap", "kept"), [(-5, "lp_ft"), (3, "lp_ft"), (40, "freeze_bn")])
def test_the_advised_recipe_is_kept_unless_another_is_ahead_by_more_than_chance(gap, kept, tmp_path):
    candidates = [Cell(name, (), load_recipe(name)) for name in ("lp_ft", "freeze_bn")]
    rng = np.random.default_rng(0)
    first = np.zeros(200)
    first[:100] = 1
    rng.shuffle(first)
    second = first.copy()
    flipped = rng.permutation(np.flatnonzero(first == (gap < 0)))[: abs(gap)]
    second[flipped] = float(gap > 0)
    back = rng.permutation(np.flatnonzero(first == (gap > 0)))[:10]  # they also disagree where nothing is to be gained
    forth = rng.permutation(np.setdiff1d(np.flatnonzero(first == (gap < 0)), flipped))[:10]
    second[back], second[forth] = 1 - second[back], 1 - second[forth]
    found = Comparison.of([ended("lp_ft", first, tmp_path), ended("freeze_bn", second, tmp_path)], "top1")
    chosen, why = choice(found, candidates)
    assert chosen.name == kept
    assert f"lp_ft {first.mean():.3f}" in why
    assert f"freeze_bn {second.mean():.3f}" in why


def test_a_recipe_that_failed_is_not_kept(tmp_path):
    candidates = [Cell(name, (), load_recipe(name)) for name in ("lp_ft", "freeze_bn")]
    failed = Compared("lp_ft", (), error="seed 0: out of memory")
    chosen, why = choice(Comparison.of([failed, ended("freeze_bn", np.ones(5), tmp_path)], "top1"), candidates)
    assert chosen.name == "freeze_bn"
    assert "lp_ft, which is advised, failed" in why


@pytest.mark.parametrize(("model", "layers"), [("test_resnet", 13), ("test_efficientnet", 8), ("test_vit", 0)])
def test_the_look_sees_the_network(model, layers, images, tmp_path):
    recipe = load_recipe({}, settings(images, tmp_path / "run", **{"model.name": model}))
    seen = look(recipe, tmp_path)
    assert bool(seen.bn_layers) == bool(layers)
    assert (seen.training_images, seen.classes, seen.untouched) == (18, 3, bool(layers))  # random weights
    assert (seen.readout is None) == (layers == 0)
    assert look(recipe, tmp_path) == seen


def test_the_best_network_and_the_reasons_lie_where_those_of_a_run_do(images, tmp_path):
    recipe, said = auto(images, tmp_path / "out"), []
    found = train_auto(recipe, said.append, Direct())
    assert [cell.name for cell in found.comparison.cells if cell.runs]
    chosen = next(cell for cell in found.comparison.cells if cell.name == found.recipe.name)
    run = chosen.runs[recipe.run.seed].folder
    compared = dircmp(run / "best", tmp_path / "out" / "best")
    assert [compared.diff_files, compared.left_only, compared.right_only] == [[], [], []]
    alone = bnf.finetune(str(run / "recipe.yaml"), **{"run.dir": tmp_path / "alone"})
    assert chosen.runs[recipe.run.seed].numbers["after"]["validation"] == alone.after["validation"].scalars()
    decided = json.loads((tmp_path / "out" / "decision.json").read_text())
    assert (decided["recipe"], tuple(decided["reasons"])) == (found.recipe.name, found.reasons)
    assert [f"auto   {reason}" for reason in found.reasons] == [line for line in said if line.startswith("auto")]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "How it was decided" in page
    assert main(["evaluate", f"checkpoint={tmp_path / 'out' / 'best'}"]) == 0


def test_the_same_call_goes_on_and_other_images_are_refused(images, tmp_path, monkeypatch):
    first = train_auto(auto(images, tmp_path / "out", **{"auto.budget": 0}), print, Direct())
    assert len(first.comparison.cells) == 1
    monkeypatch.setattr("bnfinetune.comparison.runs.finetune", None)  # whatever is made again fails
    again = train_auto(auto(images, tmp_path / "out", **{"auto.budget": 0}), print, Direct())
    assert again.reasons == first.reasons
    assert again.comparison.to_dict() == first.comparison.to_dict()
    others = write_images(tmp_path / "others", train=5, val=6)
    with pytest.raises(CheckpointError, match="holds a search over other images"):
        train_auto(auto(others, tmp_path / "out", **{"auto.budget": 0}), print, Direct())


def test_what_it_is_to_find_cannot_be_given(images, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"bn.affine: what recipe=auto is to find"):
        train_auto(auto(images, tmp_path / "out", **{"bn.affine": "frozen"}))
    with pytest.raises(RecipeError, match="auto compares others itself"):
        train_auto(auto(images, tmp_path / "out", **{"auto.recipes": ["auto"]}))
    with pytest.raises(RecipeError, match="names no recipes"):
        train_auto(load_recipe("full"))
    for use in (bnf.finetune, lambda recipe: check_recipe(load_recipe(recipe))):
        with pytest.raises(RecipeError, match="recipe=auto compares precise_then_freeze, .*: name one of these"):
            use("auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="recipe=auto compares in one process"):
        train_auto(auto(images, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
