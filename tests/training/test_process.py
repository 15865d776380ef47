"""A run in a process that has other business: nothing of it reaches the run, and the run leaves it as it was."""

import os

import matplotlib as mpl
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import bnfinetune as bnf
from bnfinetune.errors import RecipeError
from bnfinetune.training.launch import start_accelerator
from bnfinetune.training.measuring.measure import evaluate_checkpoint
from tests.training.loop.test_guard import settings
from tests.training.support import exported, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def theirs():
    """An Accelerator of the user's own."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    yield Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4, cpu=True)
    AcceleratorState._reset_state()
    GradientState._reset_state()


def test_a_users_accelerator_keeps_its_settings(theirs, images, tmp_path):
    bnf.finetune("full", **settings(images, tmp_path / "run", **{"train.epochs": 1}))
    evaluate_checkpoint(str(tmp_path / "run"))
    assert theirs.mixed_precision == "bf16"
    assert theirs.gradient_accumulation_steps == 4
    assert Accelerator().mixed_precision == "bf16"
    with theirs.autocast():
        assert torch.is_autocast_enabled("cpu")


def test_a_users_settings_do_not_reach_the_run(theirs, images, tmp_path):
    plain = settings(images, tmp_path / "plain", **{"train.epochs": 1})
    with theirs.accumulate(torch.nn.Linear(1, 1)):
        assert not theirs.sync_gradients
        bnf.finetune("full", **plain)
        assert not theirs.sync_gradients
    AcceleratorState._reset_state()
    GradientState._reset_state()
    bnf.finetune("full", **{**plain, "run.dir": str(tmp_path / "alone")})
    one, two = exported(tmp_path / "plain/best"), exported(tmp_path / "alone/best")
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_what_is_set_for_all_of_the_process_is_as_it_was(ends, images, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setitem(mpl.rcParams, "backend", "svg")
    options = {"run.deterministic": True, "run.report": True, "train.steps": 1}
    before = dict(os.environ)
    if ends == "well":
        bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    else:
        with pytest.raises(RecipeError):
            bnf.finetune("full", **settings(images, tmp_path / "run", **options, **{"optim.name": "adahessian"}))
    assert mpl.rcParams["backend"] == "svg"
    assert not torch.are_deterministic_algorithms_enabled()
    assert dict(os.environ) == before
    assert AcceleratorState._shared_state == {}
    assert GradientState._shared_state == {}


def test_accumulation_in_the_environment_divides_nothing(images, tmp_path, monkeypatch, capsys):
    options = {"optim.name": "sgd", "train.steps": 2}
    bnf.finetune("full", **settings(images, tmp_path / "plain", **options))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    capsys.readouterr()
    bnf.finetune("full", **settings(images, tmp_path / "other", **options))
    assert "the launcher's 4 accumulation steps are not used: train.grad_accum" in capsys.readouterr().out
    one, two = exported(tmp_path / "plain/best"), exported(tmp_path / "other/best")
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize(
    ("said", "asked", "used"), [("bf16", None, "bf16"), ("bf16", "no", "no"), ("no", None, "no"), (None, None, "no")]
)
def test_the_launchers_precision_is_followed_where_the_recipe_has_none(
    said, asked, used, images, tmp_path, monkeypatch
):
    if said is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
    options = {"train.steps": 1, "train.mixed_precision": asked}
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    assert result.recipe.train.mixed_precision == used
    assert f"mixed_precision: {used}" in (tmp_path / "run/recipe.yaml").read_text().replace("'", "")
    going_on = {**options, "train.resume": "auto"}
    bnf.finetune("full", **settings(images, tmp_path / "run", **going_on))


def test_fp16_on_a_cpu_is_refused_for_training_and_measures_in_float32(images, tmp_path, monkeypatch):
    options = settings(images, tmp_path / "run", **{"train.steps": 1})
    with pytest.raises(RecipeError, match=r"train.mixed_precision=fp16 needs a GPU.*bf16 or no"):
        bnf.finetune("full", **options, **{"train.mixed_precision": "fp16"})
    for said, message in (("fp16", "the launcher's mixed precision=fp16 needs"), ("fp8", "fp8 is not supported")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
        with pytest.raises(RecipeError, match=message):
            bnf.finetune("full", **options)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert not (tmp_path / "run").exists()
    result = bnf.finetune("full", **options)
    measured = evaluate_checkpoint(str(tmp_path / "run"), ["train.mixed_precision=fp16"])
    assert measured["validation"] == result.after["validation"]


def test_what_is_used_of_accelerate_is_there():
    """Private names, which another version may have changed."""
    accelerator = start_accelerator()
    for kind, own in ((AcceleratorState, accelerator.state), (GradientState, accelerator.gradient_state)):
        assert "_shared_state" in vars(kind)
        assert vars(own) is not kind._shared_state


@pytest.mark.parametrize(("name", "message"), [
    ("wandb", r"run.tracking=wandb: its package is not installed: pip install 'bnfinetune\[wandb\]'"),
    ("comet_ml", r"run.tracking=comet_ml: its package is not installed: pip install comet-ml"),
    ("tensorbord", "has no tracker 'tensorbord'; did you mean tensorboard"),
])  # fmt: skip
def test_a_tracker_that_is_not_there_stops_the_run_before_it_begins(name, message, images, tmp_path, monkeypatch):
    monkeypatch.setattr("bnfinetune.training.launch.get_available_trackers", list)
    with pytest.raises(RecipeError, match=message):
        bnf.finetune("full", **settings(images, tmp_path / "run", **{"run.tracking": name}))
    assert not (tmp_path / "run").exists()


def test_all_files_of_a_run_are_as_readable_as_others(images, tmp_path):
    mask = os.umask(0o027)
    try:
        bnf.finetune("full", **settings(images, tmp_path / "run", **{"train.steps": 1, "run.report": True}))
    finally:
        os.umask(mask)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    assert any(path.suffix == ".safetensors" for path in files)
