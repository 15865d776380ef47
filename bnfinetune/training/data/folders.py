"""Folders of class folders: `ROOT/CLASS/image.jpg`, or `ROOT/train/CLASS/image.jpg` with `val` or `test` beside it.

Names of folders are data: they become class names as they stand, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import datasets

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.training.data.hints import listed
from bnfinetune.training.data.images import EXTENSIONS

VALIDATION_NAMES: Final = ("validation", "val", "valid", "dev")
"""Names of a validation split where the recipe gives none, the likeliest first."""

SPLIT_NAMES: Final = ("train", *VALIDATION_NAMES, "test")
"""Names that are splits rather than classes."""

_IMAGE, _LABEL = "image", "label"


def read_class_folders(root: Path, data: Data) -> dict[str, datasets.Dataset] | None:
    """One data set of image paths and class names per split; all is `train` where there are no split folders.

    Images may lie deeper in their class folder; hidden files and other files are passed over.

    Returns:
        The splits by name, or None if no folder below `root` holds an image.

    Raises:
        DataError: A class folder has no image, there are no class folders, or a folder cannot be read.
    """
    inner = _folders(root)
    if not any(_has_image(folder) for folder in inner):
        return None
    splits = _split_folders(inner, data)
    if splits:
        return {folder.name: _read_split(folder) for folder in splits}
    if {folder.name for folder in inner} <= set(SPLIT_NAMES):
        names = listed(folder.name for folder in inner)
        raise DataError(f"data.source: the folders {names} of {printable(root)} hold images but no class folders")
    return {"train": _read_split(root)}


def printable(path: Path | str) -> str:
    """A path or name as valid Unicode on one line; the rare file name that is neither is escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _split_folders(folders: list[Path], data: Data) -> list[Path]:
    """Those named by the recipe or named as splits are, if they hold class folders with images."""
    wanted = {data.train_split, data.val_split, data.test_split, *SPLIT_NAMES}
    return [
        folder for folder in folders if folder.name in wanted and any(_has_image(inner) for inner in _folders(folder))
    ]


def _read_split(root: Path) -> datasets.Dataset:
    paths: list[str] = []
    classes: list[str] = []
    for folder in _folders(root):
        images = [str(path) for path in _images(folder)]
        if not images:
            raise DataError(f"the class folder {printable(folder)} holds no image: add one or remove the folder")
        paths.extend(images)
        classes.extend([folder.name] * len(images))
    features = datasets.Features({_IMAGE: datasets.Image(decode=False), _LABEL: datasets.Value("string")})
    try:
        return datasets.Dataset.from_dict({_IMAGE: paths, _LABEL: classes}, features=features)
    except UnicodeEncodeError as error:
        raise DataError(f"a file or folder name below {printable(root)} is not valid UTF-8: rename it") from error


def _has_image(folder: Path) -> bool:
    return next(_images(folder), None) is not None


def _images(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Image files below a folder in the order of their names; a link back to a folder `above` is not followed."""
    status = folder.stat()
    here = above | {(status.st_dev, status.st_ino)}
    if len(here) == len(above):
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _images(Path(entry.path), here)
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            yield Path(entry.path)


def _folders(root: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(root) if entry.is_dir()]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise DataError(f"cannot read the folder {printable(folder)}: {error.strerror}") from error
    return sorted(visible, key=lambda entry: entry.name)
