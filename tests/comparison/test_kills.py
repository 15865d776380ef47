"""Comparisons whose processes are killed, here or in a cluster: the same table, bit for bit."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bnfinetune.comparison import runs
from bnfinetune.comparison.race import compare
from bnfinetune.errors import RecipeError
from tests.comparison.test_race import Direct, plain
from tests.training.support import write_images

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("BNF_KILLS", "3"))
"""A few, which take a minute; BNF_KILLS=20 makes more."""
MEASURED = ("name", "seeds", "validation", "behind_winner", "updates", "left_after", "error")
"""What a comparison says that does not depend on the clock."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("kills") / "images", train=8, val=6)


def table(out):
    saved = json.loads((out / "comparison.json").read_text())
    told = [{key: cell[key] for key in MEASURED} for cell in saved["cells"]]
    losses = [
        json.loads(path.read_text())["after"]["validation"]["loss"] for path in sorted(out.glob("*/*/summary.json"))
    ]
    return saved["winner"], told, losses


def compare_in_forks(planned, out, kill_worker_after):
    """A comparison whose workers start at once, as they inherit the imports; one may be killed on the way."""
    runs.multiprocessing = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method: runs.multiprocessing

    def kill():
        time.sleep(kill_worker_after)
        for child in multiprocessing.active_children()[:1]:
            os.kill(child.pid, signal.SIGKILL)

    if kill_worker_after is not None:
        threading.Thread(target=kill, daemon=True).start()
    compare(planned, out=out, seeds=2, jobs=2, race=False)


@pytest.mark.timeout(100 + 100 * KILLS)
def test_a_comparison_killed_at_random_moments_gives_the_same_table(images, nursery, tmp_path):
    planned = plain(images, **{"train.epochs": 3, "checkpoint.every_steps": 1})
    compare(planned, out=tmp_path / "whole", seeds=2, race=False, executor=Direct(), say=lambda _: None)
    rng, kills, lives = random.Random(0), 0, 0
    while kills < KILLS:
        out = tmp_path / f"killed-{lives}"
        for _ in range(50):
            of_worker = rng.random() < 0.5
            moment = rng.uniform(0.2, 3)
            options = {} if of_worker else {"kill_after": moment}
            (code,) = nursery.run(compare_in_forks, planned, out, moment if of_worker else None, **options)
            kills += of_worker or code == -signal.SIGKILL
            if code == 0:
                break
            assert code == -signal.SIGKILL, nursery.said()
        assert code == 0, nursery.said()
        assert table(out) == table(tmp_path / "whole")
        lives += 1


def test_a_worker_ends_with_the_process_that_started_it():
    """Otherwise it would go on, and hold the lock of its run against the comparison that is started again."""
    script = (
        "import os, time\nfrom bnfinetune.comparison.runs import local_processes\n"
        "if __name__ == '__main__':\n"
        "    pool = local_processes(1)\n    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 100).result()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def kill_one_worker(cluster, out):
    """Kill a worker of a Dask cluster once a run has begun."""
    while not list(Path(out).glob("*/*/recipe.yaml")):
        time.sleep(0.05)
    os.kill(next(iter(cluster.workers.values())).process.pid, signal.SIGKILL)


def test_a_dask_cluster_whose_worker_is_killed_gives_the_same_table(images, tmp_path, capsys):
    distributed = pytest.importorskip("distributed")
    from bnfinetune.cli import main

    file = tmp_path / "cells.yaml"
    words = {"frozen": "freeze_bn", "live": "full"}
    shared = {key: value for key, value in plain(images, **{"train.epochs": 2})["live"].items() if key != "base"}
    file.write_text(json.dumps({name: {"recipe": recipe, **shared} for name, recipe in words.items()}))
    command = ["compare", f"cells={file}", "seeds=2", "race=off"]
    assert main([*command, f"out={tmp_path / 'here'}", "jobs=2"]) == 0
    with distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        out = tmp_path / "there"
        threading.Thread(target=kill_one_worker, args=(cluster, out), daemon=True).start()
        assert main([*command, f"out={out}", f"scheduler={cluster.scheduler_address}"]) == 0
    assert table(out) == table(tmp_path / "here")


def test_a_dask_scheduler_that_does_not_answer_is_told(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(runs, "_ANSWER_WITHIN", 1)
    with pytest.raises(RecipeError, match=r"scheduler=tcp://127.0.0.1:9: no scheduler of Dask answers"):
        runs.cluster("tcp://127.0.0.1:9")
