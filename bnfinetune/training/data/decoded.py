"""Decoded images that the loader processes of a rank share, so that from the second epoch on no file is decoded.

Each process appends what it decodes to a file of its own, and then enters where it lies into an index that all of them
map: one number per image, written in one piece, so that nobody waits for anybody. What two processes decode at the same
time is kept twice, and either is right.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Final

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
        self.budget = min(budget, shutil.disk_usage(tempfile.gettempdir()).free // 2) if budget else 0
        self.folder: Path | None = None
        self._opened: list[dict[int, BinaryIO]] = []

    def shelf(self, name: str, images: int) -> Shelf:
        """A place for images that are numbered from 0; the same name gives the same place.

        Args:
            name: what is kept there, fit for a file's name.
            images: how many there may be.
        """
        if self.folder is None and self.budget:
            _sweep()
            self.folder = Path(tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-"))
            weakref.finalize(self, _remove, self.folder, os.getpid())
        shelf = Shelf(self, name, images)
        self._opened.append(shelf.files)
        return shelf

    def close(self) -> None:
        """Remove the folder; what is asked for from now on is made anew."""
        if self.folder is not None:
            _remove(self.folder, os.getpid())
            self.folder = None
        for files in self._opened:
            for file in files.values():
                file.close()
            files.clear()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to find the folder."""
        return {**vars(self), "_opened": []}


class Shelf:
    """Images of one kind, made once by whichever process is first asked for them; pickled, it is the same place.

    Attributes:
        files: Open in this process, by the number of who wrote them.
    """

    def __init__(self, home: DecodedImages, name: str, images: int) -> None:
        self._home, self._name, self._images = home, name, images
        self._fits: bool | None = None if home.folder is not None and images else False
        self._process: int | None = None
        self._index: Any = None
        self._own: int | None = None  # number of the file that this process writes
        self._full = False
        self.files: dict[int, BinaryIO] = {}
        if self._fits is None and not self._index_path.exists():
            np.zeros(images, dtype=np.uint64).tofile(self._index_path)

    def get(self, number: int, make: Callable[[], Pixels]) -> Pixels:
        """The image of a number, shape (height, width, channels); as `make` gives it where it is not kept yet.

        Nothing is kept of a set that does not fit as a whole, to judge by the first image that this process makes.
        """
        if self._fits is False or self._home.folder is None:
            return make()
        with suppress(OSError, ValueError):  # what somebody has removed from the folder is decoded again
            self._open()
            if (entry := int(self._index[number])) != 0:
                return self._read(entry >> _OFFSET_BITS, entry & ((1 << _OFFSET_BITS) - 1))
        pixels = make()
        if self._fits is None:
            self._fits = pixels.nbytes * self._images <= self._home.budget
        if self._fits and not self._full and self._index is not None:
            with suppress(OSError):  # a full disk
                self._keep(number, pixels)
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to find the place."""
        return {**vars(self), "_process": None, "_index": None, "_own": None, "files": {}}

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
            if self._process is not None:
                self.files = {}
            self._index = np.memmap(self._index_path, dtype=np.uint64, mode="r+", shape=(self._images,))
            self._process, self._own = os.getpid(), None

    def _read(self, writer: int, offset: int) -> Pixels:
        if writer not in self.files:
            self.files[writer] = self._path(writer).open("r+b", buffering=0)
        file = self.files[writer].fileno()
        height, width, channels = np.frombuffer(os.pread(file, 3 * _SHAPE.itemsize, offset), _SHAPE)
        found = os.pread(file, int(height) * int(width) * int(channels), offset + 3 * _SHAPE.itemsize)
        return np.frombuffer(found, np.uint8).reshape(height, width, channels)

    def _keep(self, number: int, pixels: Pixels) -> None:
        """Append an image, and enter it when all of it is there."""
        taken = sum(entry.stat().st_size for entry in os.scandir(self._folder))
        self._full = taken + pixels.nbytes > self._home.budget
        if self._full:
            return
        if self._own is None:
            self._own = self._claim()
        file = self.files[self._own]
        record = np.array(pixels.shape, _SHAPE).tobytes() + np.ascontiguousarray(pixels).tobytes()
        begin = file.seek(0, os.SEEK_END)
        if file.write(record) == len(record):
            self._index[number] = (self._own << _OFFSET_BITS) | begin

    def _claim(self) -> int:
        """The number of a new file for this process alone."""
        for number in count(1):
            with suppress(FileExistsError):
                self.files[number] = self._path(number).open("x+b", buffering=0)
                return number
        raise AssertionError

    def _path(self, writer: int) -> Path:
        return self._folder / f"{self._name}.{writer}"


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a worker that ends has only lost its copy
        shutil.rmtree(folder, ignore_errors=True)


def _prefix() -> str:
    """What the folders of this machine's processes begin with, in a place that it may share with others."""
    return f"{_PREFIX}{platform.node()}-"


def _sweep() -> None:
    """Remove what processes of this machine have left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{glob.escape(_prefix())}*"):
        owner = folder.name.removeprefix(_prefix()).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
