"""Arrays that a run computes once: in memory, or above a budget in memory-mapped files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from bnfinetune.errors import DataError
from bnfinetune.recipe import Train
from bnfinetune.training.launch import on_main

_MIB: Final = 2**20
_BLOCK: Final = 64 * _MIB  # bytes that are exchanged at a time

Shapes = Mapping[str, tuple[tuple[int, ...], Any]]
Fill = Callable[..., None]
Arrays = Sequence[NDArray[Any]]


class ArrayCache:
    """The arrays of `train.cache_*`.

    Files lie on the disk of every machine, for all its ranks: those of `train.cache_dir` on that of rank 0 alone, all
    others in temporary folders, which `close` removes. Machines exchange arrays, and need no common disk.

    Attributes:
        keeps: Whether arrays stay for later runs, in `train.cache_dir`.
    """

    def __init__(self, section: Train, accelerator: Accelerator) -> None:
        self.section, self.accelerator = section, accelerator
        self.keeps = section.cache_dir is not None
        self._machine = accelerator.process_index - accelerator.local_process_index  # its first rank
        self._temporary: Path | None = None
        self._left = section.cache_memory * _MIB

    def shared(self, name: str, shapes: Shapes, fill: Fill) -> Arrays:
        """Arrays that all ranks have, of which each fills a share.

        Args:
            name: What they hold; kept arrays of this name are taken as they are.
            shapes: Shape and dtype by the arrays' own names; rows are counted along the second axis.
            fill: Gets the arrays, zeros at first, and writes this rank's rows.

        Raises:
            DataError: The folder cannot be written.
        """
        if not self.keeps and self._fits(shapes):
            arrays = [np.zeros(shape, dtype=dtype) for shape, dtype in shapes.values()]
            fill(*arrays)
            for array in arrays:
                array[...] = self._summed(array)  # a row is zero on all ranks but the one that filled it
            return arrays
        folder = self._folder_of_machine()
        paths = {key: folder / f"{name}.{key}.npy" for key in shapes}
        kept = on_main(self.accelerator, lambda: all(path.is_file() for path in paths.values()))
        machines = set(gather_object([self._machine]))
        if not kept:
            self._write(paths, shapes, self._filled(name, shapes, fill))
        elif machines != {0}:
            first = self._machine == 0
            self._write(paths, shapes, [np.load(path, mmap_mode="r") for path in paths.values()] if first else None)
        arrays = [np.load(path, mmap_mode="r") for path in paths.values()]
        self.accelerator.wait_for_everyone()  # whoever ends first removes its files
        return arrays

    def own(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array of this rank alone, for this run."""
        if self._fits({name: (shape, np.float32)}):
            return np.zeros(shape, dtype=np.float32)
        return open_memmap(self._temporary_folder() / f"{name}.npy", "w+", np.float32, shape)

    def close(self) -> None:
        """Remove what does not stay; what a rank still reads goes with the last reader."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _fits(self, shapes: Shapes) -> bool:
        """Whether arrays fit into what is left of the budget, which they then take."""
        size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits

    def _filled(self, name: str, shapes: Shapes, fill: Fill) -> Arrays:
        """Files of this rank, of which only its own rows take up room."""
        folder = self._temporary_folder()
        own = [open_memmap(folder / f"{name}.{key}.own", "w+", dtype, shape) for key, (shape, dtype) in shapes.items()]
        fill(*own)
        return own

    def _write(self, paths: Mapping[str, Path], shapes: Shapes, own: Arrays | None) -> None:
        """Write on every machine what all ranks have of the arrays; None: this rank has nothing.

        Files get their names when they are complete. A machine that has them already takes part, and writes none.
        """
        first = self.accelerator.is_local_main_process and not all(path.is_file() for path in paths.values())
        self.accelerator.wait_for_everyone()  # before the first file appears
        unfinished = {key: path.with_suffix(".part") for key, path in paths.items()}
        for number, (key, (shape, dtype)) in enumerate(shapes.items()):
            target = open_memmap(unfinished[key], "w+", dtype, shape) if first else None
            step = max(1, _BLOCK // (int(np.prod(shape)) // shape[1] * np.dtype(dtype).itemsize))
            for begin in range(0, shape[1], step):
                size = (shape[0], min(step, shape[1] - begin), *shape[2:])
                rows = np.s_[:, begin : begin + step]
                block = np.zeros(size, dtype=dtype) if own is None else np.array(own[number][rows])
                total = self._summed(block)
                if target is not None:
                    target[rows] = total
            if target is not None:
                target.flush()
        if first:
            for key, path in paths.items():
                unfinished[key].replace(path)
        self.accelerator.wait_for_everyone()

    def _summed(self, array: NDArray[Any]) -> NDArray[Any]:
        """The sum over all ranks."""
        if self.accelerator.num_processes == 1:
            return array
        total = torch.from_numpy(array).to(self.accelerator.device)
        torch.distributed.all_reduce(total)
        summed: NDArray[Any] = total.cpu().numpy()
        return summed

    def _folder_of_machine(self) -> Path:
        """Where the ranks of this machine find arrays, on its disk."""
        kept = on_main(self.accelerator, self._kept_folder)
        mine = None if self.accelerator.process_index else kept
        if self.accelerator.is_local_main_process and mine is None:
            mine = self._temporary_folder()
        told: list[tuple[int, Path | None]] = gather_object([(self._machine, mine)])
        return next(folder for machine, folder in told if machine == self._machine and folder is not None)

    def _kept_folder(self) -> Path | None:
        if self.section.cache_dir is None:
            return None
        folder = Path(self.section.cache_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"train.cache_dir: {folder} cannot be made ({error.strerror}); name another folder"
            ) from error
        return folder

    def _temporary_folder(self) -> Path:
        if self._temporary is None:
            self._temporary = Path(mkdtemp(prefix="bnfinetune-features-"))
        return self._temporary
