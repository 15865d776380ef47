"""One rank that fails or hangs ends all of them soon, and what it said is not lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bnfinetune.cli import main
from bnfinetune.errors import DataError
from bnfinetune.training import failures
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.run import finetune
from tests.training.loop.test_guard import settings
from tests.training.support import write_images

WORDS = ["recipe=full", "model.name=test_resnet", "model.pretrained=false", "data.image_size=32", "data.workers=0",
         "train.batch_size=3", "run.check=off", "run.report=false", "checkpoint.every_steps=1"]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def fail_on_rank_1(how: str) -> None:
    """Let rank 1 come to grief in its third update."""
    update = Trainer._update

    def failing(self, group):
        if self.progress.update == 2 and os.environ["RANK"] == "1":
            if how == "hangs":
                time.sleep(1000)
            elif how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "breaks":
                raise ZeroDivisionError("a mistake of ours")
            raise DataError("cannot read the image 7.png")
        update(self, group)

    Trainer._update = failing


def command(words, how):
    fail_on_rank_1(how)
    sys.exit(main(words))


LOST = "bnfinetune: error: another process has ended, or gave no answer for train.timeout_minutes=0.2: what it said"


@pytest.mark.parametrize(
    ("how", "codes", "said"),
    [
        ("fails", [2, 2], "bnfinetune: error: [rank 1] cannot read the image 7.png"),
        pytest.param("breaks", [2, 1], "ZeroDivisionError: a mistake of ours", marks=pytest.mark.slow),
        pytest.param("is killed", [2, -9], LOST, marks=pytest.mark.slow),
        pytest.param("hangs", [2, -9], LOST, marks=pytest.mark.slow),  # idle for the timeout
    ],
)
def test_all_ranks_end_and_the_state_before_is_whole(how, codes, said, nursery, images, tmp_path):
    words = [*WORDS, f"data.source={images}", f"run.dir={tmp_path / 'run'}", "train.timeout_minutes=0.2"]
    found = nursery.run(command, words, how, ranks=2, kill_others=how == "hangs")
    assert found == codes, nursery.said()
    assert nursery.said().count(said) == 1  # on the stderr that both share
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == ["update-00000001", "update-00000002"]


def apart(words, folder, failing, error, deaf):
    """Every rank has a stderr of its own; one fails in an update, and one hears of it by its main thread too late."""
    rank, update = int(os.environ["RANK"]), Trainer._update
    os.dup2(os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)

    def failing_update(self, group):
        if self.progress.update == 2:
            if rank == failing:
                raise error
            if rank == deaf:
                time.sleep(2 * failures._STAY)
        update(self, group)

    Trainer._update = failing_update
    sys.exit(main(words))


@pytest.mark.parametrize(
    ("failing", "error", "line", "ranks", "deaf"),
    [
        (0, DataError("no image 7.png"), "no image 7.png", 2, None),
        pytest.param(0, DataError("no image 7.png"), "no image 7.png", 3, 2, marks=pytest.mark.slow),
        pytest.param(1, ZeroDivisionError("ours"), "ZeroDivisionError: ours", 2, None, marks=pytest.mark.slow),
    ],
    ids=["fails", "fails beside a deaf one", "breaks"],
)
def test_every_rank_says_once_which_failed_and_why(failing, error, line, ranks, deaf, nursery, images, tmp_path):
    words = [*WORDS, f"data.source={images}", f"run.dir={tmp_path / 'run'}"]
    codes = nursery.run(apart, words, tmp_path, failing, error, deaf, ranks=ranks, kill_others=False)
    for rank in range(ranks):
        said = (tmp_path / f"{rank}.txt").read_text()
        if rank != failing:
            assert codes[rank] == 2
            assert "Traceback" not in said
            assert [each for each in said.splitlines() if "bnfinetune" in each] == [
                f"bnfinetune: error: [rank {failing}] {line}"
            ]
        elif isinstance(error, DataError):
            assert [each for each in said.splitlines() if "bnfinetune" in each] == [f"bnfinetune: error: {line}"]


def fail_twice(options, folder):
    """All ranks fail alike; then, in the same processes, one of them."""
    update = Trainer._update

    def failing(self, group):
        if self.recipe.run.dir == str(folder / "first"):
            raise DataError("no image 7.png")
        if os.environ["RANK"] == "1":
            raise DataError("no image 8.png")
        update(self, group)

    Trainer._update = failing
    with pytest.raises(DataError):
        finetune("full", **options | {"run.dir": folder / "first"})
    finetune("full", **options | {"run.dir": folder / "second"})


def test_a_failure_is_of_its_run_alone(nursery, images, tmp_path):
    options = settings(images, tmp_path, **{"train.batch_size": 3})
    assert nursery.run(fail_twice, options, tmp_path, ranks=2, kill_others=False) == [1, 1]
    assert "TrainingError: no image 8.png" in nursery.said()
    assert "7.png" not in nursery.said()


@pytest.mark.slow
def test_a_failure_under_torchrun(images, tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        "import sys; from tests.training.test_lost_ranks import command; command(sys.argv[1:], 'fails')\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    options = [f"data.source={images}", f"run.dir={tmp_path / 'run'}", "train.timeout_minutes=0.2"]
    done = subprocess.run(
        [*launcher, *WORDS, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode != 0
    assert "bnfinetune: error: [rank 1] cannot read the image 7.png" in done.stderr
    assert (tmp_path / "run/checkpoints/update-00000002").is_dir()
