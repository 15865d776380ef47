"""When runs without epochs pause, what they say of themselves, and where they write."""

import json
import subprocess
import sys

import pytest

import bnfinetune as bnf
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.data.from_recipe import recipe_loaders
from bnfinetune.training.data.splits import load_splits
from bnfinetune.training.launch import start_accelerator
from bnfinetune.training.loop.progress import Rhythm, rhythm_of
from tests.training.loop.test_guard import settings
from tests.training.support import write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    ("more", "updates", "rhythm"),
    [
        ({"data.streaming": True}, 1_000, Rhythm(100, 15.0, by_itself=True)),
        ({"data.streaming": True}, 3, Rhythm(1, 15.0, by_itself=True)),
        ({"data.streaming": True, "checkpoint.every_minutes": 2}, 11, Rhythm(2, 2, by_itself=True)),
        ({"data.streaming": True, "evaluate.every_steps": 7}, 100, Rhythm(7, None)),
        ({}, 100, Rhythm(None, None)),
    ],
)
def test_streams_have_a_rhythm(more, updates, rhythm):
    assert rhythm_of(load_recipe("full", {**more, "train.steps": updates}), updates) == rhythm


def test_a_stream_is_measured_and_saved_before_its_end_and_says_so(images, tmp_path, capsys):
    options = {"data.streaming": True, "data.shuffle_buffer": 5, "train.steps": 25, "checkpoint.keep": 99}
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    assert [record["update"] for record in result.history] == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 9
    assert "measured every 3 updates (evaluate.every_steps), saved every 15 minutes" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["tent", "adabn"])
def test_what_does_not_train_announces_no_training(recipe, images, tmp_path, capsys):
    bnf.finetune(recipe, **settings(images, tmp_path / "run"))
    said = capsys.readouterr().out
    first = said.splitlines()[0]
    assert "no training" in first
    assert "epochs" not in first
    assert "group" not in said
    assert "weight decay" not in said
    assert json.loads((tmp_path / "run/summary.json").read_text())["updates"] == 0


@pytest.mark.parametrize("key", ["run.dir", "train.resume", "train.cache_dir", "model.checkpoint"])
def test_a_tilde_is_the_home_folder(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    section, name = key.split(".")
    recipe = load_recipe("full", [f"{key}=~/x y"])
    assert getattr(getattr(recipe, section), name) == "/home/somebody/x y"
    assert load_recipe("full", ["train.resume=auto"]).train.resume == "auto"


@pytest.mark.parametrize(("method", "lasting"), [("fork", {"train", "val"}), ("spawn", None), ("forkserver", None)])
def test_processes_that_start_slowly_last(method, lasting, images, monkeypatch):
    monkeypatch.setattr("bnfinetune.training.data.loaders.get_start_method", lambda allow_none: method)
    recipe = load_recipe("full", {"data.source": str(images), "data.image_size": 32, "data.workers": 1})
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear",
              "crop_pct": 1.0}  # fmt: skip
    loaders = recipe_loaders(recipe, load_splits(recipe.data, 0), config, start_accelerator())
    named = {"train": loaders.train, "val": loaders.val, "stats": loaders.stats, "augmented": loaders.augmented_stats,
             "target": loaders.targets["validation"]}  # fmt: skip
    assert {name for name, loader in named.items() if loader.persistent_workers} == (lasting or set(named))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.long)])
def test_a_run_starts_slow_processes_once(method, images, tmp_path):
    script = tmp_path / "run.py"
    given = settings(images, tmp_path / "run", **{"data.workers": 1, "model.name": "test_resnet", "train.epochs": 3,
                                                   "recalibrate.at": ["eval"]})  # fmt: skip
    script.write_text(
        "import multiprocessing\n"
        "from multiprocessing.process import BaseProcess\n"
        "import bnfinetune\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    start, started = BaseProcess.start, []\n"
        "    BaseProcess.start = lambda self: (started.append(self._target.__name__), start(self))[1]\n"
        f"    bnfinetune.finetune('full', **{given!r})\n"
        "    print('started', started.count('_worker_loop'))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "started 3"  # for training, validation and statistics
