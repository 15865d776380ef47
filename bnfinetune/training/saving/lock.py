"""One run at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from bnfinetune.errors import CheckpointError

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class RunLock:
    """Keeps other runs out of a folder until the `with` block is left.

    It is a POSIX record lock on `RUN/.lock`: the system drops it with the process that holds it, however that ends, so
    that a file left behind by a dead run locks nothing. Loader processes do not inherit it. On a folder that several
    machines share, it keeps runs on other machines out as far as the file system passes locks on (NFS from version 4
    does); where there are no locks at all, nothing is refused.

    Not filelock: that is a `flock`, which forked loader processes hold on to in most of its versions, after a kill too.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor = -1

    def take(self, folder: Path) -> None:
        """Lock an existing folder; once taken, a second call for it does nothing.

        Raises:
            CheckpointError: Another process holds it, or the folder cannot be written.
        """
        path = folder / LOCK
        while self._path != path:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise CheckpointError(
                    f"run.dir: {folder} cannot be written ({error.strerror}); choose another run.dir"
                ) from error
            if _lock(descriptor, folder) and _is_at(descriptor, path):
                self._path, self._descriptor = path, descriptor
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            else:  # the run that held it has ended and removed the file in between
                os.close(descriptor)

    def release(self) -> None:
        """Let others in."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._path = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise CheckpointError(
            f"run.dir: {folder} is in use by {owner}; wait for that run, or choose another run.dir"
        ) from error
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
