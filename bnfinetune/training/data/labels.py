"""Which columns hold images and labels, and labels as class numbers that all splits agree on.

Labels of several images are an array of class numbers, of shape `(rows,)`, or, where an image may have any number of
them (`data.task=multilabel`), of 0 and 1, of shape `(rows, classes)`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import datasets
import numpy as np

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.training.data.hints import did_you_mean, listed
from bnfinetune.training.data.stratify import Indices, Labels, class_counts

LABEL_NAMES: Final = ("label", "labels", "class", "cls", "target", "category", "fine_label", "class_name", "label_name")
"""Names that a column of labels is known by where its type does not tell, the likeliest first."""

_BINARY: Final = ("binary", "large_binary")
_TEXT: Final = ("string", "large_string")


def find_columns(features: Mapping[str, Any], data: Data, where: str) -> tuple[str, str]:
    """The names of the image and the label column: as the recipe says, or found by type and then by name.

    Raises:
        DataError: A column that was named is missing, none is found, or several could be meant.
    """
    image = _column("data.image_column", data.image_column, _image_candidates(features), features, where)
    others = {name: feature for name, feature in features.items() if name != image}
    candidates = _label_candidates(others, several=data.task == "multilabel")
    return image, _column("data.label_column", data.label_column, candidates, features, where)


def _column(key: str, named: str | None, candidates: Sequence[str], features: Mapping[str, Any], where: str) -> str:
    if named is not None:
        if named not in features:
            raise DataError(
                f"{key}: {where} has no column {named!r}, only {listed(features)}{did_you_mean(named, features)}"
            )
        return named
    if len(candidates) == 1:
        return candidates[0]
    found = f"could mean {listed(candidates)}" if candidates else f"is not told by the columns {listed(features)}"
    raise DataError(f"{key} of {where} {found}: name it")


def _image_candidates(features: Mapping[str, Any]) -> list[str]:
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return typed or [name for name, feature in features.items() if _holds_files(feature)]


def _holds_files(feature: Any) -> bool:
    """Whether a column holds encoded files, as bytes or as `datasets` stores an image."""
    if isinstance(feature, Mapping):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in _BINARY


def _label_candidates(features: Mapping[str, Any], *, several: bool) -> list[str]:
    lists = [name for name, feature in features.items() if several and is_list(feature) and _is_plain(element(feature))]
    if lists:
        named = known_label(lists)
        return lists if named is None else [named]
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(typed) == 1:
        return typed
    named = known_label(typed or features)
    return [named] if named is not None else typed or _lone_value(features)


def known_label(columns: Collection[str]) -> str | None:
    """The likeliest of columns that are called as labels are, in any case; None if there is none."""
    folded = {name.casefold(): name for name in reversed([*columns])}
    return next((folded[name] for name in LABEL_NAMES if name in folded), None)


def _lone_value(features: Mapping[str, Any]) -> list[str]:
    """The only other column, if it holds plain values."""
    return [name for name, feature in features.items() if _is_plain(element(feature)) and len(features) == 1]


def _is_plain(feature: Any) -> bool:
    return isinstance(feature, datasets.Value | datasets.ClassLabel)


def is_list(feature: Any) -> bool:
    """Whether a column holds a list per image."""
    return isinstance(feature, datasets.List | datasets.LargeList)


def element(feature: Any) -> Any:
    """What a column holds, or what is in its lists."""
    return feature.feature if is_list(feature) else feature


@dataclass(frozen=True)
class Coding:
    """How the values of a label column become class numbers.

    Attributes:
        classes: Class names, by number.
        values: The value that stands for each class in the column: a name, or a number where numbers have no names.
    """

    classes: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def of_feature(cls, feature: Any, declared: tuple[str, ...] | int | None, where: str) -> Coding | None:
        """The coding that a column's type or `data.classes` tells; None if only the values themselves can."""
        if is_list(feature) and _is_plain(element(feature)):
            raise DataError(f"{where} holds lists: data.task=multilabel reads any number of labels per image")
        if isinstance(feature, datasets.ClassLabel):
            return cls.of_names(feature.names)
        dtype = getattr(feature, "dtype", None)
        if not isinstance(feature, datasets.Value) or not (dtype in _TEXT or dtype == "bool" or "int" in str(dtype)):
            raise DataError(f"{where} holds {_kind(feature)}, not a class name or number per image")
        if declared is None:
            return None
        names = [str(number) for number in range(declared)] if isinstance(declared, int) else declared
        texts = cls.of_names(names)
        return texts if dtype in _TEXT else cls(texts.classes, tuple(range(len(texts.classes))))

    @classmethod
    def of_names(cls, names: Iterable[str]) -> Coding:
        """Names that stand for themselves; those that differ in how Unicode spells them only are one."""
        texts = tuple(dict.fromkeys(one_spelling(name) for name in names))
        return cls(texts, texts)

    @classmethod
    def of_values(cls, values: Sequence[Any]) -> Coding:
        """Sorted distinct values: texts are names, numbers are named by themselves."""
        distinct = tuple(sorted(set(values)))
        return cls(tuple(str(value) for value in distinct), distinct)

    @classmethod
    def of_network(cls, names: Sequence[str], values: Sequence[Any], declared: tuple[str, ...] | int | None) -> Coding:
        """The coding by which a network that knows classes by `names` reads a column of these values.

        Numbers that are no names themselves are positions: in `data.classes`, or else in the network's own names.
        """
        known = cls.of_names(names)
        numbers = [value for value in set(values) if isinstance(value, int)]
        if not numbers or {str(value) for value in numbers} <= set(known.classes):
            return cls(known.classes, tuple(numbers_as_named(known.classes, numbers)))
        order = [one_spelling(name) for name in declared] if isinstance(declared, tuple) else list(known.classes)
        places = {name: place for place, name in enumerate(order)}
        return cls(known.classes, tuple(places.get(name) for name in known.classes))

    def encode(self, values: Sequence[Any], where: str, against: str) -> Indices:
        """Class numbers of column values.

        Raises:
            DataError: A value stands for no class.
        """
        numbers = {value: number for number, value in enumerate(self.values)}
        unknown = sorted({value for value in values if value not in numbers}, key=str)
        if unknown:
            hint = did_you_mean(str(unknown[0]), self.classes)
            raise DataError(f"{where} has the class {listed(unknown, 3)} that {against} lacks{hint}")
        return np.fromiter((numbers[value] for value in values), dtype=np.int64, count=len(values))


def column_values(split: Any, column: str) -> list[Any]:
    """The labels of a split as plain values, or lists of them: names for a `ClassLabel`, None where there is none.

    There is none where the column has null, or the number -1 of a `ClassLabel`.
    """
    feature = split.features[column]
    inner = element(feature)
    # -1, which means unlabelled, is the last
    names = (*map(one_spelling, inner.names), None) if isinstance(inner, datasets.ClassLabel) else ()

    def plain(value: Any) -> Any:
        if names:
            return None if value is None else names[value]
        return one_spelling(value) if isinstance(value, str) else value

    values = _arrow(split, column).to_pylist()
    if is_list(feature):
        return [None if value is None else [plain(each) for each in value] for value in values]
    return [plain(value) for value in values]


def one_spelling(name: str) -> str:
    """A name as Unicode composes it: file systems give the same letters in several forms."""
    return unicodedata.normalize("NFC", name)


def numbers_as_named(names: Sequence[str], numbers: Collection[int]) -> list[Any]:
    """Each name, or the number among `numbers` that it writes (False and True are numbers too)."""
    written = {str(number): number for number in numbers}
    return [written.get(name, name) for name in names]


def column_numbers(split: Any, column: str) -> Labels:
    """The labels of a split as `with_labels` wrote them."""
    feature, table = split.features[column], _arrow(split, column)
    if not is_list(feature):
        return np.asarray(table.to_numpy(), dtype=np.int64)
    table = table.combine_chunks()
    hot = np.zeros((len(table), len(feature.feature.names)), dtype=np.uint8)
    hot[np.repeat(np.arange(len(table)), table.value_lengths().fill_null(0).to_numpy()), table.flatten().to_numpy()] = 1
    return hot


def _arrow(split: Any, column: str) -> Any:
    """A column as pyarrow has it, of the rows that the split selects."""
    return split.select_columns([column]).with_format("arrow")[:][column]


def with_labels(split: Any, column: str, classes: tuple[str, ...], labels: Labels) -> Any:
    """The split with its labels as a column of `ClassLabel`, or of lists of it, over `classes`."""
    feature = label_feature(classes, several=labels.ndim == 2)
    if split.features[column] == feature:
        return split
    values = [np.flatnonzero(row) for row in labels] if labels.ndim == 2 else labels
    return split.remove_columns(column).add_column(column, values, feature=feature)


def label_feature(classes: Sequence[str], *, several: bool) -> Any:
    """The type of a column of labels over `classes`."""
    feature = datasets.ClassLabel(names=list(classes))
    return datasets.List(feature) if several else feature


def check_labelled(values: Sequence[Any], where: str) -> None:
    """Raise a `DataError` if an image has no label."""
    missing = sum(value is None for value in values)
    if missing:
        first = next(row for row, value in enumerate(values) if value is None)
        raise DataError(f"{where}: {missing} of {len(values)} images have no label, the first in row {first}")


def check_classes(classes: tuple[str, ...], labels: Labels, where: str) -> None:
    """Raise a `DataError` unless there are two classes or more, each with an image; one will do of several labels."""
    if len(classes) < 2 and labels.ndim == 1:
        raise DataError(f"{where} has one class only, {listed(classes)}: classification needs two or more")
    empty = np.flatnonzero(class_counts(labels, len(classes)) == 0)
    if len(empty):
        names = listed(classes[number] for number in empty)
        raise DataError(f"{where} has no training image of the class {names}: add images or drop the class")


def _kind(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__
