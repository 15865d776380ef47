"""Images of any number of labels each (`data.task=multilabel`): how people write them, and as arrays of 0 and 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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


def label_sets(values: Mapping[str, Sequence[Any]], where: Mapping[str, str]) -> dict[str, list[LabelSet]]:
    """The distinct labels of each image, by split; they are written in one way in all splits.

    Args:
        values: What a column holds, by split: lists of names or numbers, lists of 0 and 1 that are all equally long
            (multi-hot), texts such as `a|b` or `a;b`, or single labels; None and empty lists where there is no label.
        where: What a message calls the column of each split.

    Raises:
        DataError: A label is empty, no image of a split has one, or it is not clear what separates labels.
    """
    every = [value for part in values.values() for value in part if value is not None]
    read: Callable[[Any], LabelSet]
    if any(isinstance(value, list) for value in every):
        read = _positions if _are_flags(every) else _distinct
    else:
        mark = _find_mark(every, next(iter(where.values())))
        read = partial(_split, mark=mark) if mark is not None else _alone
    sets = {split: [[] if value is None else read(value) for value in part] for split, part in values.items()}
    for split, part in sets.items():
        _check(part, where[split])
    return sets


def _check(sets: Sequence[LabelSet], where: str) -> None:
    empty = next((row for row, found in enumerate(sets) if None in found or "" in found), None)
    if empty is not None:
        raise DataError(f"{where}: row {empty} has an empty label among {listed(sets[empty])}: remove or name it")
    without = sum(not found for found in sets)
    if without == len(sets):
        raise DataError(f"{where}: none of {without} images has a label")
    if without:
        note(f"{where}: {without} of {len(sets)} images have no label and count as images of no class")
    if max(map(len, sets)) == 1:
        note(f"{where}: no image has more than one label (data.task=multilabel); {_REMEDY}")


def _are_flags(lists: Sequence[LabelSet]) -> bool:
    """Whether lists are of 0 and 1, all equally long; as class numbers, all images would have the same ones."""
    flags = all(isinstance(value, int) and value in (0, 1) for value in chain.from_iterable(lists))
    return flags and len({len(found) for found in lists}) == 1 and len(lists[0]) > 1


def _find_mark(values: Sequence[Any], where: str) -> str | None:
    """What separates labels in texts; None if nothing does."""
    texts = [value for value in values if isinstance(value, str)]
    marks = [mark for mark in _MARKS if any(mark in text for text in texts)]
    if len(marks) > 1:
        examples = listed(next(text for text in texts if mark in text) for mark in marks)
        raise DataError(f"{where} holds both | and ;, as in {examples}: {_REMEDY}")
    doubtful = next((text for text in texts if "," in text or text.startswith("[")), None)
    if doubtful is not None and not marks:
        raise DataError(f"{where}: is {doubtful!r} one label or several? {_REMEDY[0].upper()}{_REMEDY[1:]}")
    return marks[0] if marks else None


def _positions(flags: LabelSet) -> LabelSet:
    positions: LabelSet = np.flatnonzero(flags).tolist()
    return positions


def _distinct(labels: LabelSet) -> LabelSet:
    return list(dict.fromkeys(labels))  # a list of objects has the same class twice


def _split(text: str, mark: str) -> LabelSet:
    return _distinct([part.strip() for part in text.split(mark) if part.strip()])


def _alone(label: Any) -> LabelSet:
    return [label]


def note_separated(classes: Sequence[str], where: str) -> None:
    """Say that class names, of images of one class each, look like several labels."""
    alike = next((name for name in classes for mark in _MARKS if set(_split(name, mark)) & {*classes} - {name}), None)
    if alike is not None:
        note(f"{where}: the class {alike!r} is made of others; data.task=multilabel reads it as several labels")


def multi_hot(sets: Sequence[LabelSet], coding: Coding, where: str, against: str) -> Labels:
    """Labels of images as 0 and 1, of shape `(rows, classes)`; see `Coding.encode`."""
    numbers = coding.encode([*chain.from_iterable(sets)], where, against)
    hot = np.zeros((len(sets), len(coding.classes)), dtype=np.uint8)
    hot[np.repeat(np.arange(len(sets)), [len(found) for found in sets]), numbers] = 1
    return hot
