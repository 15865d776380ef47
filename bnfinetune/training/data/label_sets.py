"""Images of any number of labels each (`data.task=multilabel`): how people write them, and as arrays of 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numpy as np

from bnfinetune.errors import DataError
from bnfinetune.notes import note
from bnfinetune.training.data.hints import listed
from bnfinetune.training.data.labels import Coding
from bnfinetune.training.data.stratify import Labels

_MARKS: Final = ("|", ";")
_REMEDY: Final = "separate the labels of an image by | or by ;, or write lists (metadata.jsonl, parquet)"

LabelSet = list[Any]


def label_sets(values: Sequence[Any], where: str) -> list[LabelSet]:
    """The distinct labels of each image.

    Args:
        values: What a column holds: lists of names or numbers, lists of 0 and 1 that are all equally long (multi-hot),
            texts such as `a|b` or `a;b`, or single labels; None and empty lists of images without labels.
        where: What a message calls the column.

    Raises:
        DataError: A label is empty, no image has one, or it is not clear what separates labels.
    """
    sets = _of_lists(values) if any(isinstance(value, list) for value in values) else _of_texts(values, where)
    for row, found in enumerate(sets):
        if None in found or "" in found:
            raise DataError(f"{where}: row {row} has an empty label among {listed(values[row])}: remove or name it")
    without = sum(not found for found in sets)
    if without == len(sets):
        raise DataError(f"{where}: none of {without} images has a label")
    if without:
        note(f"{where}: {without} of {len(sets)} images have no label and count as images of no class")
    if max(map(len, sets)) == 1:
        note(f"{where}: no image has more than one label (data.task=multilabel); {_REMEDY}")
    return sets


def note_separated(classes: Sequence[str], where: str) -> None:
    """Say that class names, of images of one class each, look like several labels."""
    alike = next((name for name in classes for mark in _MARKS if set(_split(name, mark)) & {*classes} - {name}), None)
    if alike is not None:
        note(f"{where}: the class {alike!r} is made of others; data.task=multilabel reads it as several labels")


def _of_lists(values: Sequence[Any]) -> list[LabelSet]:
    lists = [value or [] for value in values]
    if _is_multi_hot(lists):
        return [np.flatnonzero(flags).tolist() for flags in lists]
    return [list(dict.fromkeys(found)) for found in lists]  # a list of objects has the same class twice


def _is_multi_hot(lists: Sequence[LabelSet]) -> bool:
    """Whether lists are of 0 and 1, all equally long, and could not be lists of two class numbers."""
    flags = all(isinstance(value, int) and value in (0, 1) for value in chain.from_iterable(lists))
    return flags and len({len(found) for found in lists}) == 1 and any(len(set(found)) < len(found) for found in lists)


def _of_texts(values: Sequence[Any], where: str) -> list[LabelSet]:
    texts = [value for value in values if isinstance(value, str)]
    marks = [mark for mark in _MARKS if any(mark in text for text in texts)]
    if len(marks) > 1:
        examples = listed(next(text for text in texts if mark in text) for mark in marks)
        raise DataError(f"{where} holds both | and ;, as in {examples}: {_REMEDY}")
    doubtful = next((text for text in texts if "," in text or text.startswith("[")), None)
    if doubtful is not None and not marks:
        raise DataError(f"{where}: is {doubtful!r} one label or several? {_REMEDY[0].upper()}{_REMEDY[1:]}")
    if not marks:
        return [[] if value is None else [value] for value in values]
    return [_split(value or "", marks[0]) for value in values]


def _split(text: str, mark: str) -> LabelSet:
    return list(dict.fromkeys(part.strip() for part in text.split(mark) if part.strip()))


def multi_hot(sets: Sequence[LabelSet], coding: Coding, where: str, against: str) -> Labels:
    """Labels of images as 0 and 1, of shape `(rows, classes)`; see `Coding.encode`."""
    numbers = coding.encode([*chain.from_iterable(sets)], where, against)
    hot = np.zeros((len(sets), len(coding.classes)), dtype=np.uint8)
    hot[np.repeat(np.arange(len(sets)), [len(found) for found in sets]), numbers] = 1
    return hot
