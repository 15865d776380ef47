"""A process that has imported everything once and forks a child for each job: a run in tenths of a second."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_IMPORTS = ("bnfinetune.training.run", "matplotlib.pyplot", "timm.models", "sklearn.metrics", "tests.training.killing")


class Job(NamedTuple):
    """A function of tests, by name, that `ranks` children call with the same arguments."""

    module: str
    function: str
    args: tuple[Any, ...]
    ranks: int
    kill_after: float | None
    kill_others: bool
    log: Path


class Nursery:
    """Runs functions in forked children of one warm process, and tells how each ended.

    Example:
        >>> with Nursery(tmp_path) as nursery:
        ...     codes = nursery.run(train, options, ranks=2)
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "nursery.log"
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **quiet},
        )

    def run(
        self,
        function: Callable[..., None],
        *args: Any,
        ranks: int = 1,
        kill_after: float | None = None,
        kill_others: bool = True,
    ) -> list[int]:
        """Exit codes by rank: 0, 1 after an exception, or minus the signal that ended it.

        Once a rank has failed, the others are killed, as launchers do, unless `kill_others` is off. `kill_after` kills
        all of them after so many seconds.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = Job(function.__module__, function.__qualname__, args, ranks, kill_after, kill_others, self.log)
        pickle.dump(job, self.process.stdin)
        self.process.stdin.flush()
        codes: list[int] = pickle.load(self.process.stdout)
        return codes

    def said(self) -> str:
        """What the children of the last job wrote to stdout and stderr."""
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what imports and children print is no answer
    import torch

    torch.set_num_threads(1)
    for name in _IMPORTS:
        importlib.import_module(name)
    while True:
        try:
            job: Job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_run(job), answers)
        answers.flush()


def _run(job: Job) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job.log.write_bytes(b"")
    running = {_fork(job, rank, port): rank for rank in range(job.ranks)}
    codes, pids, begin = [0] * job.ranks, list(running), time.monotonic()
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            code = codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            if code != 0 and job.kill_others:
                _kill(running)
        elif job.kill_after is not None and time.monotonic() - begin > job.kill_after:
            _kill(running)
        else:
            time.sleep(0.005)
    for pid in pids:  # loader processes outlive a killed rank by seconds
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return codes


def _kill(pids: Any) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _fork(job: Job, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        log = os.open(job.log, os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job.ranks > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
        getattr(importlib.import_module(job.module), job.function)(*job.args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError


if __name__ == "__main__":
    _serve()
