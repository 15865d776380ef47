"""A run says when its network gives every image the same answer, and is silent about sound ones."""

import pytest
import torch
from torch.nn import functional as F

import bnfinetune as bnf
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.measuring.collapse import CollapseWatch, only_answer
from bnfinetune.training.measuring.metrics import LabelMetrics, Tally

CLASSES = 5
LABELS = torch.arange(CLASSES).repeat(40)  # 200 images


def metrics_of(answers, labels=LABELS, confusion=True):
    tally = Tally(CLASSES, confusion=confusion)
    tally.add(F.one_hot(answers, CLASSES).float(), labels)
    return tally.metrics()


def watch():
    return CollapseWatch(load_recipe("full", {"optim.lr": 3e-3}), [f"class {number}" for number in range(CLASSES)])


ALL_TWO = torch.full_like(LABELS, 2)


def test_one_answer_is_seen_where_answers_are_counted():
    assert only_answer(metrics_of(ALL_TWO)) == 2
    assert only_answer(metrics_of(ALL_TWO, confusion=False)) is None
    nearly = ALL_TWO.clone()
    nearly[:3] = 0
    assert only_answer(metrics_of(nearly)) == 2
    assert only_answer(metrics_of(torch.full_like(LABELS, 4), LABELS % 4)) == 4  # a class that no image is of


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        pytest.param(LABELS, LABELS, id="all right"),
        pytest.param((LABELS + 1) % CLASSES, LABELS, id="all wrong, each in its own way"),
        pytest.param(torch.where(LABELS < 3, LABELS, 2), LABELS, id="two classes never given"),
        pytest.param(ALL_TWO, ALL_TWO, id="images of one class only"),
        pytest.param(torch.where(LABELS % 2 == 0, LABELS, 2), LABELS, id="half right"),
        pytest.param((LABELS % 3 * 2) % 3, LABELS % 3, id="two of three swapped"),
    ],
)
def test_other_mistakes_are_not_taken_for_it(answers, labels):
    assert only_answer(metrics_of(answers, labels)) is None


def test_several_labels_per_image_have_no_one_answer():
    metrics = LabelMetrics(images=4, loss=0.1, map=0.5, macro_f1=0.5, micro_f1=0.5, per_class=(1.0, 0.0))
    assert only_answer(metrics) is None


def test_it_is_said_once_and_not_early_with_what_to_do():
    look, collapsed, sound = watch().look, metrics_of(ALL_TWO), metrics_of(LABELS)
    assert look(collapsed, 49, 1.6) is None
    said = look(collapsed, 50, 1.6)
    assert said.startswith("all validation images are called class 2: the network has collapsed")
    assert said.endswith("try optim.lr=0.001")
    assert look(collapsed, 100, 1.6) is None
    look = watch().look
    assert look(sound, 100, 0.1) is None
    assert "its running statistics do not fit" in look(collapsed, 200, 0.1)


def test_a_run_that_collapses_says_so(tmp_path, capsys):
    options = {"train.epochs": 3, "optim.lr": 10.0, "data.workers": 0, "run.report": False, "train.max_skipped": 1000}
    bnf.finetune("freeze_bn", **{"run.dir": tmp_path / "run", **options})
    assert capsys.readouterr().out.count("the network has collapsed") == 1
    assert "try optim.lr=3" in (tmp_path / "run/run.log").read_text()
