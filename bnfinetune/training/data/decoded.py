"""Decoded images that all loader processes of a rank share, so that from the second epoch on no file is decoded.

Each process appends what it decodes to a file of its own, and then enters where it lies into an index that all of them
map: one number per image, written in one piece, so that nobody waits for anybody. What two processes decode at the same
time is kept twice, and either is right.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from numpy.typing import NDArray

_PREFIX: Final = "bnfinetune-decoded-"
_OFFSET_BITS: Final = 48  # of an entry; above them stands the writer's number, from 1
_SHAPE = np.dtype(np.int32)

Pixels = NDArray[np.uint8]


class DecodedImages:
    """A temporary folder of decoded images; it goes when it is closed, or with the process that made it.

    Args:
        budget: bytes that it may take; never more than half of what the disk has left.
    """

    def __init__(self, budget: int) -> None:
        self.budget = min(budget, shutil.disk_usage(tempfile.gettempdir()).free // 2)
        self.folder: Path | None = None

    def shelf(self, name: str, images: int) -> Shelf:
        """A place for images that are numbered from 0; the same name gives the same place.

        Args:
            name: what is kept there, fit for a file's name.
            images: how many there may be.
        """
        if self.folder is None and self.budget:
            _sweep()
            self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
            weakref.finalize(self, _remove, self.folder, os.getpid())
        return Shelf(self, name, images)

    def close(self) -> None:
        """Remove the folder; what is asked for from now on is made anew."""
        if self.folder is not None:
            _remove(self.folder, os.getpid())
            self.folder = None


class Shelf:
    """Images of one kind, made once by whichever process is first asked for them; pickled, it is the same place."""

    def __init__(self, home: DecodedImages, name: str, images: int) -> None:
        self._home, self._name, self._images = home, name, images
        self._fits: bool | None = None if home.folder is not None and images else False
        self._process: int | None = None
        self._index: Any = None
        self._files: dict[int, int] = {}
        self._own, self._end = 0, 0
        if self._fits is None and not self._index_path.exists():
            np.zeros(images, dtype=np.uint64).tofile(self._index_path)

    def get(self, number: int, make: Callable[[], Pixels]) -> Pixels:
        """The image of a number, shape (height, width, channels); as `make` gives it where it is not kept yet.

        Nothing is kept of a set that does not fit as a whole, to judge by the first image that this process makes.
        """
        if self._fits is False or self._home.folder is None:
            return make()
        self._open()
        if (entry := int(self._index[number])) != 0:
            return self._read(entry >> _OFFSET_BITS, entry & ((1 << _OFFSET_BITS) - 1))
        pixels = make()
        if self._fits is None:
            self._fits = pixels.nbytes * self._images <= self._home.budget
        if self._fits:
            with suppress(OSError):  # a full disk: then it is decoded again
                self._keep(number, pixels)
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to find the place."""
        return {**vars(self), "_process": None, "_index": None, "_files": {}}

    @property
    def _folder(self) -> Path:
        assert self._home.folder is not None, "without a folder nothing is kept"
        return self._home.folder

    @property
    def _index_path(self) -> Path:
        return self._folder / f"{self._name}.index"

    def _open(self) -> None:
        """Map the index in this process; what it inherited by a fork is its parent's."""
        if self._process != os.getpid():
            self._process, self._files, self._own = os.getpid(), {}, 0
            self._index = np.memmap(self._index_path, dtype=np.uint64, mode="r+", shape=(self._images,))

    def _read(self, writer: int, offset: int) -> Pixels:
        if writer not in self._files:
            self._files[writer] = os.open(self._path(writer), os.O_RDONLY)
        height, width, channels = np.frombuffer(os.pread(self._files[writer], 3 * _SHAPE.itemsize, offset), _SHAPE)
        size = int(height) * int(width) * int(channels)
        found = os.pread(self._files[writer], size, offset + 3 * _SHAPE.itemsize)
        return np.frombuffer(found, np.uint8).reshape(height, width, channels)

    def _keep(self, number: int, pixels: Pixels) -> None:
        """Append an image, and enter it when all of it is there."""
        if not self._own:
            self._own, self._files[0], self._end = *self._claim(), 0
        taken = sum(entry.stat().st_size for entry in os.scandir(self._folder))
        if taken + pixels.nbytes > self._home.budget:
            return
        record = np.array(pixels.shape, _SHAPE).tobytes() + np.ascontiguousarray(pixels).tobytes()
        begin, self._end = self._end, self._end + os.write(self._files[0], record)
        if self._end - begin == len(record):
            self._index[number] = (self._own << _OFFSET_BITS) | begin

    def _claim(self) -> tuple[int, int]:
        """A new file for this process alone: its number and its descriptor."""
        for number in count(1):
            with suppress(FileExistsError):
                return number, os.open(self._path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        raise AssertionError

    def _path(self, writer: int) -> Path:
        return self._folder / f"{self._name}.{writer}"


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a worker that ends has only lost its copy
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Remove what processes have left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
