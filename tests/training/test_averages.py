"""Averages at the end of a run and of finished runs: what they are of, what becomes of statistics, and going on."""

import json
from pathlib import Path

import pytest
import torch

from bnfinetune.cli import main
from bnfinetune.errors import RecipeError
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.averages import candidates
from bnfinetune.training.loop.progress import Progress, Score
from bnfinetune.training.measuring.average import greedy
from bnfinetune.training.run import finetune
from tests.training.loop.test_guard import settings
from tests.training.support import bn_keys, broken_off, exported, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("average") / "images", train=8)


def averaging(images, run, how="last_k", **more):
    return settings(images, run, **{"train.average": how, "train.average_of": 3, "train.epochs": 4, **more})


def snapshots(run: Path):
    return {int(folder.name.removeprefix("update-")): exported(folder) for folder in (run / "snapshots").iterdir()}


@pytest.mark.parametrize("recipe", ["full", "freeze_bn"])
def test_the_average_is_of_the_last_evaluations(recipe, images, tmp_path, monkeypatch, capsys):
    take = Progress.take_score  # whichever is better on so few images, the average is exported
    monkeypatch.setattr(Progress, "take_score", lambda *given, **more: take(*given, **more) or True)
    result = finetune(recipe, **averaging(images, tmp_path / "run"))
    updates = [entry["update"] for entry in result.history]
    kept, best = snapshots(tmp_path / "run"), exported(tmp_path / "run" / "best")
    assert sorted(kept) == updates[-3:]
    keys = bn_keys(result.recipe.model.name)
    for key in keys["affine"] | keys["other"] | keys["head"]:
        mean = sum(state[key].double() for state in kept.values()) / 3
        torch.testing.assert_close(best[key].double(), mean, rtol=1e-6, atol=1e-7)
    last = kept[updates[-1]]
    same = [torch.equal(best[key], last[key]) for key in keys["statistics"]]
    assert all(same) if recipe == "freeze_bn" else not any(same)
    said = capsys.readouterr().out
    assert f"average  of updates {', '.join(map(str, updates[-3:]))}" in said
    assert ("BN layers anew from 24 images" in said) == (recipe == "full")
    assert f"best network of updates {', '.join(map(str, updates[-3:]))}, averaged" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["average"]["of"] == updates[-3:]
    assert json.loads((tmp_path / "run" / "best" / "statistics.json").read_text())["averaged"] == updates[-3:]


def test_an_average_that_is_worse_does_not_become_the_best(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bnfinetune.bn.average.mean_of_states", _zeros)
    monkeypatch.setattr("bnfinetune.training.measuring.average.mean_of_states", _zeros)
    plain = finetune("full", **settings(images, tmp_path / "plain", **{"train.epochs": 4}))
    averaged = finetune("full", **averaging(images, tmp_path / "run"))
    assert averaged.after == plain.after
    theirs = exported(tmp_path / "plain" / "best")
    assert all(torch.equal(value, theirs[key]) for key, value in exported(tmp_path / "run" / "best").items())
    assert "averaged" not in capsys.readouterr().out


def _zeros(states):
    from bnfinetune.bn.average import Mean

    state = next(iter(states))
    zero = {key: value if "running" in key else torch.zeros_like(value) for key, value in state.items()}
    return Mean(zero, frozenset())


@pytest.mark.parametrize("how", ["last_k", "greedy"])
def test_a_run_that_goes_on_averages_to_the_same_bits(how, images, tmp_path, monkeypatch):
    whole = finetune("full", **averaging(images, tmp_path / "whole", how))
    options = averaging(images, tmp_path / "parts", how)
    with broken_off(monkeypatch, whole.history[-2]["update"] + 1):
        finetune("full", **options)
    parts = finetune("full", **options, **{"train.resume": "auto"})
    assert parts.after == whole.after
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")]
    assert summaries[0]["average"] == summaries[1]["average"]
    theirs = exported(tmp_path / "whole" / "best")
    assert all(torch.equal(value, theirs[key]) for key, value in exported(tmp_path / "parts" / "best").items())


def test_candidates_are_the_last_or_the_best_and_no_infinite_one():
    values = [(10, 0.5, 1.0), (20, 0.9, 0.5), (30, 0.7, float("nan")), (40, 0.9, 0.4), (50, 0.6, 0.9)]
    history = [{"update": update, "top1": top1, "loss": loss} for update, top1, loss in values]
    kept = {
        how: candidates(history, load_recipe("full", {"train.average": how, "train.average_of": 3}))
        for how in ("none", "last_k", "greedy")
    }
    assert kept == {"none": [], "last_k": [20, 40, 50], "greedy": [40, 20, 50]}


def test_greedy_takes_what_does_not_make_it_worse():
    worth = {"a": 3, "ab": 2, "ac": 3, "acd": 4}
    tried = []

    def score(names):
        tried.append("".join(names))
        return Score(worth[tried[-1]], 0.0)

    assert greedy("abcd", score) == ["a", "c", "d"]
    assert tried == ["a", "ab", "ac", "acd"]
    assert greedy("ab", lambda names: None if len(names) > 1 else Score(0.0, 0.0)) == ["a"]  # not finite


def test_two_averages_at_once_are_refused():
    with pytest.raises(RecipeError, match=r"train.average and train.ema average weights twice"):
        load_recipe("full", {"train.average": "last_k", "train.ema": 0.9})


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        finetune("full", **settings(images, folder / str(seed), **{"run.seed": seed}))
    return folder


@pytest.mark.parametrize("choose", ["all", "greedy"])
def test_finished_runs_are_averaged(choose, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    out = tmp_path / "averaged"
    assert main(["average", "1", "2", f"out={out}", f"choose={choose}"]) == 0
    said = capsys.readouterr().out
    states = [exported(runs / name / "best") for name in ("1", "2")]
    about = json.loads((out / "statistics.json").read_text())
    assert all(f"{name}  " in said for name in ("1", "2", "average"))
    assert f"average of {', '.join(about['averaged'])}, " in said.replace("\n", " ")
    taken = [exported(runs / name / "best") for name in about["averaged"]]
    key = next(key for key in states[0] if key.endswith("weight"))
    mean = sum(state[key].double() for state in taken) / len(taken)
    torch.testing.assert_close(exported(out)[key].double(), mean, rtol=1e-6, atol=1e-7)
    assert main(["evaluate", f"checkpoint={out}", "format=json"]) == 0
    assert about.get("images", 24) == 24


def test_what_cannot_be_averaged_is_one_line(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    for words, message in (
        (["1", "out=new"], "an average is of two networks or more, found 1"),
        (["1", "nowhere", "out=new"], "nowhere"),
        (["1", "2", "out=1"], "1 is not empty"),
        (["1", "2"], "out= is missing"),
    ):
        assert main(["average", *words]) == 2
        assert message in capsys.readouterr().err
    assert not Path("new").exists()
