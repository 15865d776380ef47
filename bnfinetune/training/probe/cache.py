"""Arrays that a run computes once: in memory, or above a budget in memory-mapped files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

import numpy as np
import torch
from accelerate import Accelerator
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from bnfinetune.errors import DataError
from bnfinetune.recipe import Train
from bnfinetune.training.launch import on_main

_MIB: Final = 2**20

Shapes = Mapping[str, tuple[tuple[int, ...], Any]]
Fill = Callable[..., None]


class Shelf:
    """Where arrays of `train.cache_*` lie.

    Files are shared by the ranks, which must therefore see the same folder; without `train.cache_dir` it is a temporary
    one, removed by `close`.

    Attributes:
        keeps: Whether arrays stay for later runs, in `train.cache_dir`.
    """

    def __init__(self, section: Train, accelerator: Accelerator) -> None:
        self.section, self.accelerator = section, accelerator
        self.keeps = section.cache_dir is not None
        self._temporary: Path | None = None
        self._left = section.cache_memory * _MIB

    def shared(self, name: str, shapes: Shapes, fill: Fill) -> list[NDArray[Any]]:
        """Arrays that all ranks have, of which each fills a share.

        Args:
            name: What they hold; kept arrays of this name are taken as they are.
            shapes: Shape and dtype by the arrays' own names.
            fill: Gets the arrays, zeros at first, and writes this rank's rows.

        Raises:
            DataError: The folder cannot be written.
        """
        if not self.keeps and self._fits(shapes):
            return self._in_memory(shapes, fill)
        folder = on_main(self.accelerator, self._folder)
        paths = {key: folder / f"{name}.{key}.npy" for key in shapes}
        if not on_main(self.accelerator, lambda: all(path.is_file() for path in paths.values())):
            self._write(paths, shapes, fill)
        return [np.load(path, mmap_mode="r") for path in paths.values()]

    def own(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array of this rank alone, for this run."""
        if self._fits({name: (shape, np.float32)}):
            return np.zeros(shape, dtype=np.float32)
        folder = on_main(self.accelerator, self._temporary_folder)
        return open_memmap(folder / f"{name}-{self.accelerator.process_index}.npy", "w+", np.float32, shape)

    def close(self) -> None:
        """Remove what does not stay."""
        if self._temporary is not None and self.accelerator.is_main_process:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _fits(self, shapes: Shapes) -> bool:
        """Whether arrays fit into what is left of the budget, which they then take."""
        size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits

    def _in_memory(self, shapes: Shapes, fill: Fill) -> list[NDArray[Any]]:
        arrays: list[NDArray[Any]] = [np.zeros(shape, dtype=dtype) for shape, dtype in shapes.values()]
        fill(*arrays)
        if self.accelerator.num_processes > 1:
            for array in arrays:
                total = torch.from_numpy(array).to(self.accelerator.device)
                torch.distributed.all_reduce(total)  # a row is zero on all ranks but the one that filled it
                array[...] = total.cpu().numpy()
        return arrays

    def _write(self, paths: Mapping[str, Path], shapes: Shapes, fill: Fill) -> None:
        """Fill files under other names, so that a file of the right name is a complete one."""
        unfinished = {key: path.with_suffix(".part") for key, path in paths.items()}

        def create() -> None:
            for key, (shape, dtype) in shapes.items():
                open_memmap(unfinished[key], "w+", dtype, shape).flush()

        def finish() -> None:
            for key, path in paths.items():
                unfinished[key].replace(path)

        on_main(self.accelerator, create)
        arrays = [np.load(path, mmap_mode="r+") for path in unfinished.values()]
        fill(*arrays)
        for array in arrays:
            array.flush()
        self.accelerator.wait_for_everyone()
        on_main(self.accelerator, finish)

    def _folder(self) -> Path:
        if self.section.cache_dir is None:
            return self._temporary_folder()
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
