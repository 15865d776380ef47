"""A rank that fails tells the others why, so that each of them can say it."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from bnfinetune.errors import BnFinetuneError, TrainingError, error_line, say_on_stderr

_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|"
    r"Timed out waiting|timed out after|Application timeout|Socket Timeout"
)
_FAILURE, _HEARD, _TOLD = "failure", "heard", "told"  # keys of the store: the first failure, ranks and stderrs with it
_LOOK = 1.0  # seconds between two looks at the store
_STAY = 5.0  # seconds that a failing rank waits for the others at most


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
        self._store: Any = None  # shared by the ranks of a process group; None without one
        self._left = threading.Event()
        self._own: Exception | None = None  # what this rank has to tell
        self._lost = False  # whether this rank has lost another one
        self._failure: tuple[int, str] | None = None  # of another rank
        # all calls to the store: it may not answer, where the network is what has failed
        self._watch = threading.Thread(target=self._exchange, name="failures of other ranks", daemon=True)

    def __enter__(self) -> SharedFailures:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            met = torch.distributed.distributed_c10d._get_default_store()
            # a store may outlive its ranks: what those before a restart of torchrun have left is not meant
            name = broadcast_object_list([uuid.uuid4().hex])[0]
            self._store = torch.distributed.PrefixStore(f"bnfinetune/{name}", met)  # type: ignore[attr-defined]
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        if isinstance(error, Exception):  # the ends that signals ask for are agreed on
            foreign = isinstance(error, RuntimeError) and not isinstance(error, BnFinetuneError)
            self._lost = foreign and _LOST.search(str(error)) is not None
            if not self._lost and getattr(error, "rank", None) is None:
                self._own = error
        self._left.set()
        self._watch.join(_STAY + _LOOK)
        if self._lost:
            raise self._loss() from error

    def _exchange(self) -> None:
        """Hear of a failure of another rank while the main thread waits for it, and leave one of this rank."""
        with suppress(torch.distributed.DistError):  # the store went with its process
            while not self._left.wait(_LOOK):
                if self._store.check([_FAILURE]) and not self._left.wait(_LOOK):  # ranks that fail together each say it
                    self._hear()
                    return
            if self._lost and self._store.check([_FAILURE]):
                self._hear()
            elif self._own is not None:
                self._tell(self._own)

    def _hear(self) -> None:
        """Say what another rank has left."""
        rank, _, text = self._store.get(_FAILURE).decode().partition(" ")
        self._failure = int(rank), text
        if self._is_first():
            say_on_stderr(error_line(text, int(rank)))
        self._store.add(_HEARD, 1)

    def _tell(self, error: Exception) -> None:
        """Leave a line for the others, and stay until they have it."""
        text = str(error) if isinstance(error, BnFinetuneError) else f"{type(error).__name__}: {error}"
        self._is_first()  # this rank's stderr gets it with the error
        self._store.compare_set(_FAILURE, "", f"{torch.distributed.get_rank()} {text}")
        heard, until = self._store.add(_HEARD, 1), time.monotonic() + _STAY
        while heard < torch.distributed.get_world_size() and time.monotonic() < until:
            time.sleep(0.05)
            heard = self._store.add(_HEARD, 0)

    def _is_first(self) -> bool:
        """Whether no other rank has asked this of the same stderr, which those of a machine often share."""
        stderr = os.fstat(2)
        first: bool = self._store.add(f"{_TOLD}/{socket.gethostname()}/{stderr.st_dev}/{stderr.st_ino}", 1) == 1
        return first

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
