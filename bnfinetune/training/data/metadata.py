"""Images listed in a file `metadata.csv`, `.jsonl` or `.parquet`, which gives each `file_name` further columns.

Values are kept as they are written: a class may be called None, NA or nan.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import datasets

from bnfinetune.errors import DataError
from bnfinetune.notes import note
from bnfinetune.recipe import Data
from bnfinetune.training.data.folders import IMAGE, WHOLE
from bnfinetune.training.data.hints import first_line, listed
from bnfinetune.training.data.labels import known_label
from bnfinetune.training.data.split_names import split_role
from bnfinetune.training.data.walking import folders_in, has_image, images_below, printable

_NAMES: Final = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_FILE: Final = "file_name"
_LABELS: Final = "labels"

Row = dict[str, Any]


def read_metadata(root: Path, data: Data) -> dict[str, datasets.Dataset] | None:
    """The splits of images that metadata files list, with their columns.

    Where images lie in class folders too, the folders are the classes, unless the recipe names a column of the file as
    labels or a column is called as labels are.

    Returns:
        The splits by name, or None where there is no such file, or class folders tell the classes.

    Raises:
        DataError: A file cannot be read, or lists no file names although nothing else tells the classes.
    """
    rows: dict[str, list[Row]] = {}
    for folder in (root, *folders_in(root)):
        file = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
        at_root = folder == root
        if file is None or not (at_root or split_role(folder.name) or folder.name in _asked(data)):
            continue
        listed_here = _useful(file, data)
        if listed_here is None:
            continue
        names = [_split_of(row[_FILE]) if at_root else folder.name for row in listed_here]
        if None in names and WHOLE not in names:
            names = [WHOLE] * len(names)  # some only seem to tell a split
        for split, row in zip(names, listed_here, strict=True):
            rows.setdefault(split or WHOLE, []).append(_located(row, folder))
    if not rows:
        return None
    rows = _from_flags(rows, data, root)
    rows = {split: _one_row_each(part, data, root) for split, part in rows.items()}
    known = {row[IMAGE] for part in rows.values() for row in part}
    unlisted = sum(str(path) not in known for path in images_below(root))
    if unlisted:
        note(f"data.source: {unlisted} images of {printable(root)} are not listed in its metadata and are passed over")
    return {split: _table(part, root) for split, part in rows.items()}


def _from_flags(rows: dict[str, list[Row]], data: Data, root: Path) -> dict[str, list[Row]]:
    """Of several columns of 0 and 1, one for each label, a column of lists of the labels; where none is called so."""
    every = [row for part in rows.values() for row in part]
    columns = [name for name in every[0] if name not in (_FILE, IMAGE, data.domain_column)]
    flags = [name for name in columns if all(str(row.get(name)) in ("0", "1") for row in every)]
    if data.task != "multilabel" or data.label_column or known_label(columns) or len(flags) < 2:
        return rows
    note(f"data.source: the labels of {printable(root)} are its {len(flags)} columns of 0 and 1: {listed(flags)}")

    def folded(row: Row) -> Row:
        return {name: row[name] for name in row if name not in flags} | {
            _LABELS: [name for name in flags if str(row[name]) == "1"]
        }

    return {split: [folded(row) for row in part] for split, part in rows.items()}


def _one_row_each(rows: list[Row], data: Data, root: Path) -> list[Row]:
    """Of images that several rows list with a label each, one row with the list of them.

    Raises:
        DataError: Rows of one image have several labels, and `data.task` is not `multilabel`.
    """
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row[IMAGE], []).append(row)
    columns = [name for name in rows[0] if name not in (_FILE, IMAGE)]
    label = data.label_column or known_label(columns) or next((name for name in columns if len(columns) == 1), "")
    if len(by_image) == len(rows) or label not in columns:
        return rows
    sets = {image: [row[label] for row in same if row.get(label) is not None] for image, same in by_image.items()}
    if data.task == "multilabel":
        return [{**same[0], label: sets[image]} for image, same in by_image.items()]
    for image, labels in sets.items():
        if any(each != labels[0] for each in labels):
            raise DataError(
                f"data.source: the metadata of {printable(root)} gives {printable(Path(image))} the labels "
                f"{listed(labels)}: data.task=multilabel reads any number of labels per image"
            )
    return rows


def _useful(file: Path, data: Data) -> list[Row] | None:
    """The rows of a file, or None where class folders beside it tell the classes."""
    rows = _read(file)
    columns = list(rows[0]) if rows else []
    classes = [folder for folder in folders_in(file.parent) if not split_role(folder.name) and has_image(folder)]
    label = data.label_column if data.label_column in columns else known_label(columns)
    if label is not None and _FILE in columns:
        if len(classes) > 1:
            note(f"data.source: classes are the column {label!r} of {printable(file)}, not its {len(classes)} folders")
        return rows
    splits = [folder for folder in folders_in(file.parent) if split_role(folder.name)]
    if len(classes) > 1 or any(sum(map(has_image, folders_in(folder))) > 1 for folder in splits):
        found = f"its columns are {listed(columns)}" if columns else "it has no rows"
        note(f"data.source: {printable(file)} is passed over: classes are the folders, and {found}")
        return None
    if _FILE not in columns:
        raise DataError(f"data.source: {printable(file)} has no column {_FILE!r}, only {listed(columns)}")
    return rows


def _read(file: Path) -> list[Row]:
    try:
        if file.suffix == ".parquet":
            rows: list[Row] = datasets.load_dataset(
                "parquet", data_files={"train": glob.escape(str(file))}, split="train"
            ).to_list()
            return rows
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".jsonl":
                return [json.loads(line) for line in lines if line.strip()]
            head = lines.readline()
            lines.seek(0)
            delimiter = next((mark for mark in (",", ";", "\t") if mark in head), ",")
            return [
                {k: v for k, v in row.items() if k is not None} for row in csv.DictReader(lines, delimiter=delimiter)
            ]
    except Exception as error:  # OSError, UnicodeError, and what csv, json and Arrow raise
        raise DataError(f"data.source: {printable(file)} cannot be read: {first_line(error)}") from error


def _located(row: Row, folder: Path) -> Row:
    """A row with the path of its image, and None for what is empty."""
    name = str(row[_FILE])
    path = folder / name
    if not path.exists() and (folder / name.replace("\\", "/")).exists():
        path = folder / name.replace("\\", "/")  # as Windows writes it
    return {**{key: None if value == "" else value for key, value in row.items()}, IMAGE: str(path)}


def _split_of(name: Any) -> str | None:
    """The split that the first folder of a file name is."""
    first, slash, _ = str(name).replace("\\", "/").partition("/")
    return first if slash and split_role(first) else None


def _asked(data: Data) -> set[str | None]:
    return {data.train_split, data.val_split, data.test_split}


def _table(rows: Sequence[Mapping[str, Any]], root: Path) -> datasets.Dataset:
    columns = {name: _numbers([row.get(name) for row in rows]) for name in rows[0] if name != _FILE}
    try:
        return datasets.Dataset.from_dict(columns).cast_column(IMAGE, datasets.Image(decode=False))
    except Exception as error:  # Arrow's, where a column mixes types
        raise DataError(
            f"data.source: the metadata of {printable(root)} cannot be used: {first_line(error)}"
        ) from error


def _numbers(values: list[Any]) -> list[Any]:
    """Texts as whole numbers where all of them are written so, and none would be written otherwise then."""
    texts = [value for value in values if value is not None]
    if not texts or not all(isinstance(text, str) and text.isdecimal() and str(int(text)) == text for text in texts):
        return values
    return [None if value is None else int(value) for value in values]
