"""A rank that fails tells the others why, so that each of them can say it."""

from __future__ import annotations

import itertools
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch

from bnfinetune.errors import BnFinetuneError, TrainingError, error_line

_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|"
    r"Timed out waiting|timed out after|Application timeout|Socket Timeout"
)
_FAILURE, _HEARD, _TOLD = "failure", "heard", "told"  # keys of the store: the first failure, ranks and stderrs with it
_LOOK = 1.0  # seconds between two looks at the store
_STAY = 5.0  # seconds that a failing rank waits for the others at most
_numbers = itertools.count()  # of these contexts, which all ranks enter in the same order


class SharedFailures:
    """Within this context a rank that fails tells the others why, and they say it: once on each stderr.

    A collective does not: over gloo it says that a connection was closed, over NCCL it waits for the timeout or aborts
    the process. So the first rank to fail leaves a line in the store by which the ranks have met, where each looks
    once a second, be its main thread in a collective or not; and it stays until all have read it, since its end may
    be the end of the store, and of them. What all ranks know (`error.rank` is set) needs no telling.

    Args:
        minutes: How long a rank waits for the others, as its collectives were told.

    Raises:
        TrainingError: A collective failed, since another rank is gone or hangs.
    """

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._left = threading.Event()
        self._failure: tuple[int, str] | None = None  # of another rank
        self._watch = threading.Thread(target=self._listen, name="failures of other ranks", daemon=True)
        self._store: Any = None  # shared by the ranks of a process group; None without one

    def __enter__(self) -> SharedFailures:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            met = torch.distributed.distributed_c10d._get_default_store()
            self._store = torch.distributed.PrefixStore(f"bnfinetune/{next(_numbers)}", met)  # type: ignore[attr-defined]
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        self._left.set()
        self._watch.join()
        if not isinstance(error, Exception):  # the ends that signals ask for are agreed on
            return
        lost = isinstance(error, RuntimeError) and not isinstance(error, BnFinetuneError) and _LOST.search(str(error))
        with suppress(torch.distributed.DistError):  # the store went with its process
            if lost:
                self._hear(self._store)
            elif getattr(error, "rank", None) is None:
                self._tell(self._store, error)
        if lost:
            raise self._loss() from error

    def _listen(self) -> None:
        """Say the failure of another rank while the main thread waits for it."""
        with suppress(torch.distributed.DistError):
            while not self._left.wait(_LOOK):
                if self._store.check([_FAILURE]) and not self._left.wait(_LOOK):  # ranks that fail together each say it
                    self._hear(self._store)
                    return

    def _hear(self, store: Any) -> None:
        """Say what another rank has left, if it has not been said."""
        if self._failure is not None or not store.check([_FAILURE]):
            return
        rank, _, text = store.get(_FAILURE).decode().partition(" ")
        self._failure = int(rank), text
        if _is_first(store):
            print(error_line(text, int(rank)), file=sys.stderr, flush=True)
        store.add(_HEARD, 1)

    def _tell(self, store: Any, error: Exception) -> None:
        """Leave a line for the others, and stay until they have it."""
        text = str(error) if isinstance(error, BnFinetuneError) else f"{type(error).__name__}: {error}"
        _is_first(store)  # this rank's stderr gets it with the error
        store.compare_set(_FAILURE, "", f"{torch.distributed.get_rank()} {text}")
        heard, until = store.add(_HEARD, 1), time.monotonic() + _STAY
        while heard < torch.distributed.get_world_size() and time.monotonic() < until:
            time.sleep(0.05)
            heard = store.add(_HEARD, 0)

    def _loss(self) -> TrainingError:
        if self._failure is None:
            return TrainingError(
                f"another process has ended, or gave no answer for train.timeout_minutes={self._minutes:g}: what it "
                "said is the cause; the last saved state is whole"
            )
        rank, text = self._failure
        error = TrainingError(text)
        error.rank, error.told = rank, True
        return error


def _is_first(store: Any) -> bool:
    """Whether no other rank has asked this of the same stderr, which those of a machine often share."""
    stderr = os.fstat(2)
    first: bool = store.add(f"{_TOLD}/{socket.gethostname()}/{stderr.st_dev}/{stderr.st_ino}", 1) == 1
    return first
