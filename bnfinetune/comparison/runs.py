"""The runs of a comparison: each in a process of its own, resumed where one has died."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bnfinetune.errors import BnFinetuneError, RecipeError, error_line
from bnfinetune.training.run import finetune
from bnfinetune.training.saving.run_folder import METRICS, SUMMARY

_TRIES = 3  # of a run whose process dies
_LOOK_EVERY = 2  # seconds
_ANSWER_WITHIN = 10  # seconds


@dataclass(frozen=True, eq=False)
class Job:
    """One run: a recipe as plain values, and its folder."""

    cell: str
    recipe: Mapping[str, Any]
    folder: Path

    @property
    def is_done(self) -> bool:
        """Whether the run is over."""
        return (self.folder / SUMMARY).is_file()

    @property
    def newest(self) -> dict[str, Any] | None:
        """What was measured last; None before the first time."""
        try:
            return dict(json.loads((self.folder / METRICS).read_text(encoding="utf-8").splitlines()[-1]))
        except (OSError, ValueError, IndexError):
            return None


def make_run(recipe: Mapping[str, Any], folder: str) -> str | None:
    """Make a run, or go on with it; runs in any process that sees the folder and the data.

    Returns:
        What went wrong, in a line; None if nothing did.
    """
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # it has its run.log
        try:
            finetune(recipe, **{"run.dir": folder, "train.resume": "auto"})
        except BnFinetuneError as error:
            return error_line(str(error)).removeprefix("bnfinetune: error: ")
        except Exception as error:  # of a model, a data set or a driver: the other cells go on
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def make_all(
    jobs: list[Job], executor: Callable[[], Executor], look: Callable[[], None] = lambda: None
) -> Iterator[tuple[Job, str | None]]:
    """Make runs as an executor has room, and give each with what went wrong as it ends.

    Args:
        jobs: The runs; one that is over already is given at once.
        executor: Makes an executor; called again when the processes of the one before have died.
        look: Called every few seconds meanwhile, to show how far the runs are.
    """
    waiting = {job: _TRIES for job in jobs if not job.is_done}
    yield from ((job, None) for job in jobs if job.is_done)
    while waiting:
        with executor() as pool:
            futures: dict[Future[str | None], Job] = {
                pool.submit(make_run, dict(job.recipe), str(job.folder.absolute())): job for job in waiting
            }
            try:
                for future in _as_completed(futures, look):
                    job = futures[future]
                    try:
                        outcome = future.result()
                    except BrokenExecutor:  # a process was killed, and takes its neighbours along
                        waiting[job] -= 1
                        if waiting[job]:
                            continue
                        outcome = f"its process died {_TRIES} times, often for want of memory"
                    except Exception as error:  # of the executor itself: a cluster has lost its workers, say
                        outcome = f"{type(error).__name__}: {error}".splitlines()[0]
                    del waiting[job]
                    yield job, outcome
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _as_completed(futures: Mapping[Future[str | None], Job], look: Callable[[], None]) -> Iterator[Future[str | None]]:
    running = set(futures)
    while running:
        done, running = wait(running, timeout=_LOOK_EVERY, return_when=FIRST_COMPLETED)
        yield from done
        look()


def local_processes(count: int) -> Executor:
    """So many processes on this machine, each with a device of its own and its share of the cores."""
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(count):
        numbers.put(number)
    return ProcessPoolExecutor(count, context, _set_apart, (numbers, count))


def cluster(address: str) -> Executor:
    """The executor of a Dask cluster, whose workers see the comparison's folder and the data.

    Raises:
        RecipeError: Dask is not installed, or no scheduler answers there.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise RecipeError('scheduler= needs Dask: pip install "bnfinetune[cluster]"') from error
    try:
        executor: Executor = Client(address, timeout=_ANSWER_WITHIN).get_executor(retries=_TRIES, pure=False)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"scheduler={address}: no scheduler of Dask answers; start one by `dask scheduler`, then `dask worker`s"
        ) from error
    return executor


def _set_apart(numbers: Any, count: int) -> None:
    """Give this process its device and its cores, and let it end with the process that started it."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if torch.cuda.device_count() > 1:
        number = 0 if numbers.empty() else numbers.get()
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    torch.set_num_threads(max(torch.get_num_threads() // count, 1))


def _end_with(parent: int) -> None:
    """A process that was killed cannot end its own: what goes on without it would hold the lock of its run."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY / 10)
    os._exit(1)
