"""Folders of class folders: `ROOT/CLASS/image.jpg`, or `ROOT/train/CLASS/image.jpg` with `val` or `test` beside it.

Names of class folders are data: they become class names as they stand. Names of split folders are told from them by
what lies inside: a split holds class folders.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import datasets

from bnfinetune.errors import DataError
from bnfinetune.notes import note
from bnfinetune.recipe import Data
from bnfinetune.training.data.hints import listed
from bnfinetune.training.data.labels import one_spelling
from bnfinetune.training.data.split_names import split_role, split_word
from bnfinetune.training.data.walking import PassedOver, folders_in, has_image, identity, images_below, printable

IMAGE, LABEL = "image", "label"
FEATURES: Final = datasets.Features({IMAGE: datasets.Image(decode=False), LABEL: datasets.Value("string")})
WHOLE: Final = "train"
"""Name of the only split of a set that has none."""


def read_class_folders(root: Path, data: Data) -> dict[str, datasets.Dataset] | None:
    """One data set of image paths and class names per split; all is `train` where there are no split folders.

    Images may lie deeper in their class folder. What is passed over is counted and named in a note.

    Returns:
        The splits by name, or None if no folder below `root` holds an image.

    Raises:
        DataError: A class folder has no image, there are no class folders, a folder cannot be read, or it is not clear
            whether one is a split or a class.
    """
    folders = folders_in(root)
    holding = [folder for folder in folders if has_image(folder)]
    if not holding:
        return None
    passed = PassedOver()
    for entry in images_below(root, passed):
        if entry.parent == root:
            passed.counts["images that lie in no class folder"] += 1
    splits = find_splits(root, holding, data)
    loose = _loose_splits(root, holding, splits, data)
    classes = [folder for folder in folders if folder not in (*splits, *loose)]
    if not splits:
        read = {WHOLE: _read_split(root, classes)}
    else:
        read = {folder.name: _read_split(folder, folders_in(folder)) for folder in splits}
        if classes_beside := _classes_beside(root, splits, [each for each in classes if each in holding], data):
            read[WHOLE] = _read_split(root, classes_beside)
        loose = [folder for folder in holding if folder not in (*splits, *classes_beside)]
    for folder in loose:
        passed.counts[f"in the folder {folder.name!r}, which holds no class folders"] += sum(
            1 for _ in images_below(folder)
        )
    if str(passed):
        note(f"data.source: passed over in {printable(root)}: {passed}")
    return read


def find_splits(root: Path, holding: Sequence[Path], data: Data) -> list[Path]:
    """The folders that are splits: named so by the recipe or by custom, and holding class folders with images.

    Raises:
        DataError: Folders that seem to be splits are neither named as such nor as classes.
    """
    structured = [
        folder for folder in holding if folder.name not in _declared(data) and any(map(has_image, folders_in(folder)))
    ]
    asked = {name.casefold() for name in (data.train_split, data.val_split, data.test_split) if name}
    splits = [folder for folder in structured if folder.name.casefold() in asked or split_role(folder.name)]
    alike = [folder.name for folder in structured if split_word(folder.name)]
    if not splits and len(alike) > 1:
        raise DataError(
            f"data.source: the folders {listed(alike)} of {printable(root)} look like splits: name them by "
            f"data.train_split, data.val_split and data.test_split, or, if they are classes, by {_as_classes(holding)}"
        )
    inner = {tuple(each.name for each in folders_in(folder)) for folder in structured}
    shared = inner.pop() if len(inner) == 1 else ()
    if not splits and len(structured) == len(holding) > 1 and len(shared) > 1:
        note(
            f"data.source: the folders {listed(folder.name for folder in structured)} of {printable(root)} hold "
            f"folders of the same names ({listed(shared, 3)}) and are taken for classes; if they are splits, name them "
            "by data.train_split, data.val_split and data.test_split"
        )
    return splits


def _loose_splits(root: Path, holding: Sequence[Path], splits: Sequence[Path], data: Data) -> list[Path]:
    """Folders beside class folders that are named as a split but hold images without class folders: unlabelled ones.

    A folder `train` may well be a class, beside `bus` and `car`.
    """
    if splits:
        return []
    named = [folder for folder in holding if folder.name not in _declared(data) and split_role(folder.name)]
    others = [folder for folder in holding if folder not in named]
    names = listed(folder.name for folder in named)
    if not others:
        raise DataError(f"data.source: the folders {names} of {printable(root)} hold images but no class folders")
    for folder in [folder for folder in named if folder.name.casefold() == "train"]:
        note(f"data.source: the folder {folder.name!r} of {printable(root)} is taken for a class, as those beside it")
        named.remove(folder)
        others.append(folder)
    doubtful = [folder for folder in named if split_role(folder.name) != "test"]
    if doubtful or (named and len(others) < 2):
        found = (doubtful or named)[0]
        raise DataError(
            f"data.source: {printable(found)} is named as a split but holds images without class folders: move it "
            f"away, or, if it is a class, say {_as_classes(holding)}"
        )
    return named


def _classes_beside(root: Path, splits: Sequence[Path], beside: Sequence[Path], data: Data) -> list[Path]:
    """Class folders beside split folders: they are the training split where no folder is named so.

    Raises:
        DataError: There is one split folder only, and those beside it have nothing to do with its classes: it may be
            a class that is called as a split.
    """
    inner = {each.name for folder in splits for each in folders_in(folder)}
    has_train = any(split_role(folder.name) == "train" or folder.name == data.train_split for folder in splits)
    if not has_train and any(folder.name in inner for folder in beside):
        return list(beside)
    asked = {data.train_split, data.val_split, data.test_split}
    if len(splits) == 1 and beside and splits[0].name not in asked:
        name, role = splits[0].name, split_role(splits[0].name) or "train"
        raise DataError(
            f"data.source: is {name!r}, beside {listed(each.name for each in beside)} in {printable(root)}, a split or "
            f"a class? Say data.{role}_split={name}, or {_as_classes([*splits, *beside])}"
        )
    return []


def _declared(data: Data) -> tuple[str, ...]:
    """Folder names that `data.classes` says to be classes, in both spellings of Unicode."""
    names = data.classes if isinstance(data.classes, tuple) else ()
    return tuple(unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD"))


def _as_classes(folders: Iterable[Path]) -> str:
    return f"data.classes=[{', '.join(sorted(folder.name for folder in folders))}]"


def _read_split(root: Path, folders: Sequence[Path]) -> datasets.Dataset:
    paths: list[str] = []
    classes: list[str] = []
    above = frozenset({identity(root), identity(root.parent)})  # where a link out of a class folder must not lead
    for folder in folders:
        passed = PassedOver()
        images = [str(path) for path in images_below(folder, passed, above)]
        if not images:
            but = f" that can be read, but {passed}" if str(passed) else ""
            raise DataError(f"the class folder {printable(folder)} holds no image{but}: add one or remove the folder")
        paths.extend(images)
        classes.extend([folder.name] * len(images))
    if len({one_spelling(folder.name) for folder in folders}) < len(folders):
        note(f"data.source: class folders of {printable(root)} whose names differ in spelling only are one class each")
    try:
        return datasets.Dataset.from_dict({IMAGE: paths, LABEL: classes}, features=FEATURES)
    except UnicodeEncodeError as error:
        raise DataError(f"a file or folder name below {printable(root)} is not valid UTF-8: rename it") from error
