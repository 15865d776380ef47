"""Cells of a comparison: what a list varies and what it is the value of."""

import subprocess
import sys

import pytest

from bnfinetune.comparison.cells import cells_in, cells_of
from bnfinetune.errors import RecipeError


def test_lists_vary_and_cells_are_the_product():
    cells = cells_of("[freeze_bn, full]", ["optim.lr=[1e-4, 3e-4]", "train.epochs=2"])
    assert [cell.name for cell in cells] == [
        f"{recipe}, optim.lr={rate}" for recipe in ("freeze_bn", "full") for rate in ("1e-4", "3e-4")
    ]
    assert cells[1].words == ("recipe=freeze_bn", "optim.lr=3e-4", "train.epochs=2")
    assert (cells[1].recipe.name, cells[1].recipe.optim.lr, cells[1].recipe.train.epochs) == ("freeze_bn", 3e-4, 2)
    assert len({cell.folder for cell in cells}) == 4
    assert [cell.name for cell in cells_of("full", ["train.batch_size=[2, 16]"])] == [
        "train.batch_size=2",
        "train.batch_size=16",
    ]


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("recalibrate.at", "[[start], [start, end]]", [("start",), ("start", "end")]),
        ("data.augment.scale", "[[0.3, 1.0], [1.0, 1.0]]", [(0.3, 1.0), (1.0, 1.0)]),
        ("bn.layers", "[[layer1.*], [layer1.*, layer2.*]]", [("layer1.*",), ("layer1.*", "layer2.*")]),
        ("model.name", "[resnet18, resnet50]", ["resnet18", "resnet50"]),
        ("train.mixed_precision", "[null, bf16]", [None, "bf16"]),
    ],
)
def test_keys_that_are_lists_vary_by_lists_of_lists(key, value, found):
    def leaf(cell):
        at = cell.recipe
        for part in key.split("."):
            at = getattr(at, part)
        return at

    assert [leaf(cell) for cell in cells_of("full", [f"{key}={value}"])] == found


def test_a_list_that_is_a_value_stays_one():
    cells = cells_of("[full, freeze_bn]", ["recalibrate.at=[start]", "bn.layers=[layer1.*, layer2.*]"])
    assert len(cells) == 2
    assert cells[0].recipe.recalibrate.at == ("start",)


def test_a_file_may_name_cells(tmp_path):
    path = tmp_path / "cells.yaml"
    path.write_text("frozen: {recipe: freeze_bn}\nlive, slow: {recipe: full, optim.lr: 1.0e-4}\n")
    cells = cells_in(str(path), ["train.epochs=2"])
    assert [(cell.name, cell.recipe.optim.lr, cell.recipe.train.epochs) for cell in cells] == [
        ("frozen", "auto", 2),
        ("live, slow", 1e-4, 2),
    ]
    path.write_text("frozen: freeze_bn\n")
    with pytest.raises(RecipeError, match="a cell is a mapping with a recipe"):
        cells_in(str(path), [])
    with pytest.raises(RecipeError, match=r"cells: .*nowhere.yaml cannot be read"):
        cells_in(str(tmp_path / "nowhere.yaml"), [])


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("full", [], "one cell only"),
        ("[full, full]", [], "one cell only"),
        ("[full, freeze_bn]", ["run.seed=[1, 2]"], "run.seed is what compare sets itself: use seeds="),
        ("[full, freeze_bn]", ["run.dir=x"], "use out="),
        ("[full, freeze_bn]", ["optim.lrr=1"], "optim.lr"),
        ("[full, frieze_bn]", [], "freeze_bn"),
    ],
)
def test_what_is_no_comparison_is_refused(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        cells_of(recipe, overrides)


def test_mistakes_answer_without_torch():
    code = (
        "import sys\nfrom bnfinetune.cli import main\n"
        "assert main(['compare', 'recipe=[full, frieze_bn]']) == 2\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "did you mean freeze_bn" in done.stderr
