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
from bnfinetune.training.loop.trainer import Trainer
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
        pytest.param("is killed", [2, -9], "", marks=pytest.mark.slow),
        pytest.param("hangs", [2, -9], "", marks=pytest.mark.slow),  # idle for the timeout
    ],
)
def test_all_ranks_end_and_the_state_before_is_whole(how, codes, said, nursery, images, tmp_path):
    words = [*WORDS, f"data.source={images}", f"run.dir={tmp_path / 'run'}", "train.timeout_minutes=0.2"]
    found = nursery.run(command, words, how, ranks=2, kill_others=how == "hangs")
    assert found == codes, nursery.said()
    assert LOST in nursery.said()
    assert said in nursery.said()
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == ["update-00000001", "update-00000002"]


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
