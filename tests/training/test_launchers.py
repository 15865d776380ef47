"""What launchers do to a run: torchrun starts a killed rank again, Slurm signals a job and starts it again."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.killing import OPTIONS, Kill, differences, moments_of, outcome, train_until
from tests.training.support import write_images

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
QUIET = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # or ranks may read what those before the restart have left


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=8)  # 6 batches of 4, 3 updates of 2 batches


def train(options):
    train_until(None, options)


def train_until_the_third_start(path):
    """Under torchrun: a rank is killed by SIGKILL at the first start, and another one at the second."""
    options = pickle.loads(Path(path).read_bytes())
    first, second = (json.loads(moments_of(options, rank).read_text()) for rank in range(2))  # of the whole run
    kills = {"0": Kill("step", second["step"] // 2, 1), "1": Kill("saving", first["saving"] // 4, 0)}
    train_until(kills.get(os.environ["TORCHELASTIC_RESTART_COUNT"]), options)


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_after_killed_ranks(nursery, images, tmp_path):
    options = {**OPTIONS, "data.source": images, "data.workers": 2, "train.batch_size": 2}
    assert nursery.run(train, options | {"run.dir": tmp_path / "whole"}, ranks=2) == [0, 0], nursery.said()
    arguments = tmp_path / "options.pickle"
    arguments.write_bytes(pickle.dumps(options | {"run.dir": tmp_path / "run", "train.resume": "auto"}))
    script = tmp_path / "start.py"
    script.write_text(
        "import sys; from tests.training.test_launchers import train_until_the_third_start as start\n"
        "start(sys.argv[1])\n"
    )
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "2", str(script), str(arguments)],
        capture_output=True, text=True, check=False, timeout=250, env={**os.environ, **QUIET, **STORE},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(exitcode: -9)") == 2, done.stderr
    assert len(re.findall(r"^resume  after update [1-9]", done.stdout, re.MULTILINE)) == 2, done.stdout
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "run")) == []


# Slurm as far as the script of the page calls it; a signal for a step goes to its tasks, not to what they have started.
STAND_INS = {
    "srun": """
        for node in $(seq "$SLURM_NNODES"); do "$@" & tasks+=($!); done
        echo "${tasks[@]}" > "$SLURM_STAND_IN/tasks"
        for task in "${tasks[@]}"; do wait "$task" || code=$?; done
        exit ${code:-0}""",
    "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat "$SLURM_STAND_IN/tasks")',
    "scontrol": """
        [ "$*" = "requeue $SLURM_JOB_ID" ] && touch "$SLURM_STAND_IN/requeued"
        [ "$*" = "show hostnames $SLURM_JOB_NODELIST" ] && printf 'localhost\\nlocalhost\\n'""",
    "torchrun": f'exec {" ".join(TORCHRUN)} "$@"',
}


@pytest.fixture
def job(tmp_path, free_port):
    """Starts the script of docs/launching.md as Slurm would, on two nodes of one process."""
    page = (REPOSITORY / "docs/launching.md").read_text()
    script = tmp_path / "finetune.sh"
    script.write_text(re.search(r"^```bash\n(#!/bin/bash\n#SBATCH.*?)^```$", page, re.MULTILINE | re.DOTALL)[1])
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"JOB_ID": free_port, "NNODES": 2, "JOB_NODELIST": "node[1-2]", "GPUS_ON_NODE": 1, "STAND_IN": tmp_path}
    environment = {**os.environ, **QUIET, **{f"SLURM_{key}": str(value) for key, value in slurm.items()}}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    log = tmp_path / "job.log"
    jobs = []

    def start(words):
        with log.open("w") as file:
            output = {"stdout": file, "stderr": subprocess.STDOUT}
            jobs.append(subprocess.Popen(["bash", script, *words], env=environment, start_new_session=True, **output))
        return jobs[-1], log

    yield start
    for each in jobs:
        if each.poll() is None:
            os.killpg(each.pid, signal.SIGKILL)


def wait_for(condition, process, log):
    """Wait for what a process is about to do."""
    while not condition():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)


def reached(run):
    return max((int(path.name[-8:]) for path in run.glob("checkpoints/update-????????")), default=0)


def rank_of(launcher):
    """The process that a launcher has started."""
    return int(Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()[0])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Slurm is of Linux")
def test_a_slurm_job_saves_on_its_signal_and_goes_on_when_requeued_or_a_rank_is_killed(job, nursery, images, tmp_path):
    options = {**OPTIONS, "data.source": images, "data.workers": 1, "train.batch_size": 2, "train.epochs": 8}
    del options["checkpoint.every_steps"]
    assert nursery.run(train, options | {"run.dir": tmp_path / "whole"}, ranks=2) == [0, 0], nursery.said()
    words = ["recipe=full", f"run.dir={tmp_path / 'run'}", *(f"{key}={value}" for key, value in options.items())]
    running, log = job(words)
    wait_for((tmp_path / "run/checkpoints/update-00000003").is_dir, running, log)
    os.kill(running.pid, signal.SIGUSR1)
    running.wait(timeout=100)
    assert re.search(r"SIGTERM: saved after update \d+; go on with train.resume=auto", log.read_text()), log.read_text()
    assert (tmp_path / "requeued").exists()
    assert not (tmp_path / "run/summary.json").exists()
    before = reached(tmp_path / "run")
    running, log = job(words)
    wait_for(lambda: reached(tmp_path / "run") > before, running, log)
    os.kill(rank_of((tmp_path / "tasks").read_text().split()[-1]), signal.SIGKILL)
    assert running.wait(timeout=200) == 0, log.read_text()
    starts = re.findall(r"^resume  after update \d+ of 24", log.read_text(), re.MULTILINE)
    assert len(starts) == 2  # requeued, and started again by torchrun
    whole, run = outcome(tmp_path / "whole"), outcome(tmp_path / "run")
    del whole["states"], run["states"]
    assert differences(whole, run) == []
