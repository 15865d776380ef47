"""From `data.source` to the splits that are trained on, that choose the best checkpoint, and that are only measured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from bnfinetune.errors import DataError
from bnfinetune.notes import note
from bnfinetune.recipe import Data
from bnfinetune.source_paths import DEMOS
from bnfinetune.training.data.hints import did_you_mean, listed
from bnfinetune.training.data.label_sets import label_sets, multi_hot, note_separated
from bnfinetune.training.data.labels import (
    Coding,
    check_classes,
    check_labelled,
    column_numbers,
    column_values,
    element,
    find_columns,
    is_list,
    label_feature,
    with_labels,
)
from bnfinetune.training.data.levels import Levels
from bnfinetune.training.data.readable import find_levels, unreadable_images
from bnfinetune.training.data.sources import open_source
from bnfinetune.training.data.split_names import split_role
from bnfinetune.training.data.stratify import Indices, Labels, class_counts, hold_out, subset

_STREAM_SHARDS = 64  # of a set that could be counted but is read as a stream
_FINGERPRINT_IMAGES = 64  # per split, evenly spaced


@dataclass(frozen=True)
class ImageSplits:
    """Labelled images to fine-tune on. Images are still encoded; labels are class numbers.

    Attributes:
        train: Split that is trained on, a `datasets.Dataset` or, with `data.streaming`, an `IterableDataset`.
        val: Split that chooses the best checkpoint.
        test: Split that is only measured, or None.
        class_names: Names by class number, as they stand in the data: never use one as a path.
        image_column: Column of images in every split.
        label_column: Column of class numbers, or of lists of them, in every split.
        source: Where they come from, as the recipe says it.
        names: What `train`, `val` and `test` are called there.
        skipped: Unreadable images left out by `data.on_error=skip`, as far as they were found before training.
        domain_column: Column of domain names in the training split, or None.
        levels: Values of 16-bit and float images that become 0 and 255; empty where there are no such images.
        measured_as: What `val` is called where it is measured: `validation`, and `test` or `all` of a set of which
            nothing is trained on.
    """

    train: Any
    val: Any
    test: Any | None
    class_names: tuple[str, ...]
    image_column: str
    label_column: str
    source: str
    names: Mapping[str, str]
    skipped: tuple[str, ...] = ()
    domain_column: str | None = None
    levels: Levels = field(default_factory=dict)
    measured_as: str = "validation"

    def describe(self) -> str:
        """One line: source, images per split, classes."""
        sizes = [f"{_size(split)} {role}" for role, split in self._by_role().items()]
        left_out = f", {len(self.skipped)} unreadable left out" if self.skipped else ""
        return f"{self.source}: {', '.join(sizes)} images{left_out}; {len(self.class_names)} classes"

    def fingerprint(self) -> str:
        """A hash of what the splits hold, alike on every machine and wherever the files lie.

        It covers class names, the labels in their order, the names of image files, and the contents of 64 images of
        each split. Of a stream, it covers the source as the recipe says it, class names and features.
        """
        digest = blake2b(digest_size=16)
        digest.update(repr((self.class_names, sorted(self.names.items()))).encode())
        for role, split in self._by_role().items():
            digest.update(role.encode())
            if isinstance(split, datasets.IterableDataset):
                digest.update(repr((self.source, split.features)).encode())
            else:
                for part in _identity(split, self.image_column, self.label_column, self.source):
                    digest.update(part)
        return digest.hexdigest()

    def _by_role(self) -> dict[str, Any]:
        roles = {"train": self.train, "validation": self.val, "test": self.test}
        return {role: split for role, split in roles.items() if split is not None}


class Network(NamedTuple):
    """What a network that is there already expects of data: its classes by number, and the levels of wide images.

    Without class names, those of the data are taken.
    """

    class_names: tuple[str, ...]
    levels: Levels


def load_splits(data: Data, seed: int, *, network: Network | None = None, whole: bool = False) -> ImageSplits:
    """Open a source and settle its splits, columns and classes.

    Where there is no validation split, a stratified share of the training split is held out. Everything that can be
    wrong with a set is found here, before anything of a run is written; so are unreadable images of a small set. Of a
    large one, only the first bytes of some images are looked at.

    Args:
        data: The recipe's `data` section.
        seed: Seed of the choice of held-out images and of `data.train_samples`.
        network: The network that is to be measured: its classes are the classes, of which the data may lack some.
        whole: Hold nothing out and choose no samples. Where there is no validation split, `val` is the test split,
            which may be the only one there is, or else the training split.

    Raises:
        DataError: With one line that names the file, split, column or class and the remedy.
    """
    if data.streaming and data.domain_column is not None:
        raise DataError("data.domain_column is not read from a stream: unset data.streaming")
    opened = open_source(data)
    names = _choose_splits(list(opened), data, whole=whole)
    _note_left_over(opened, names, data)
    where = {role: f"split {name!r} of {data.source}" for role, name in names.items()}
    splits = {role: _resolved(opened[name], where[role]) for role, name in names.items()}
    image, label = find_columns(splits["train"].features, data, where["train"])
    columns = {role: [image, label] for role in splits}
    if data.domain_column is not None:
        columns["train"].append(data.domain_column)
    splits = {role: _chosen_columns(split, columns[role], where[role]) for role, split in splits.items()}
    if any(isinstance(split, datasets.IterableDataset) for split in splits.values()):
        return _stream_splits(splits, names, data, image, label, network, whole)

    parts, classes = _encode_labels(splits, label, data, where, network)
    skipped: list[str] = []
    if data.source not in DEMOS:
        parts = {role: _readable(part, image, data, where[role], skipped) for role, part in parts.items()}
    levels = network.levels if network is not None else {}
    levels = levels or (find_levels(parts["train"].split, image) if data.source not in DEMOS else {})
    if network is None:
        check_classes(classes, parts["train"].labels, where["train"])
        _note_absent(parts, classes, where)
    if not whole:
        if "val" not in parts:
            parts["train"], parts["val"] = _hold_out(parts["train"], classes, data, seed)
            names["val"] = names["train"]
        parts["train"] = _subset(parts["train"], data, seed)
    if data.streaming:
        parts["train"] = parts["train"].as_stream()
    train, val, test = (parts[role].split if role in parts else None for role in ("train", "val", "test"))
    domains, measured_as = data.domain_column, _measured_as(names["val"], data) if whole else "validation"
    return ImageSplits(
        train, val, test, classes, image, label, data.source, names, tuple(skipped), domains, levels, measured_as
    )


class _Part(NamedTuple):
    """A split and its labels."""

    split: Any
    labels: Labels

    def select(self, rows: Indices) -> _Part:
        return _Part(self.split.select(rows), self.labels[rows])

    def as_stream(self) -> _Part:
        return self._replace(split=self.split.to_iterable_dataset(num_shards=min(_STREAM_SHARDS, len(self.labels))))


def _choose_splits(found: list[str], data: Data, *, whole: bool) -> dict[str, str]:
    """Map `train`, and `val` and `test` where there are such, to names of splits."""
    asked = {"train": data.train_split, "val": data.val_split, "test": data.test_split}
    names = {role: _asked_split(role, name, found, data.source) for role, name in asked.items() if name is not None}
    for role in ("train", "val", "test"):
        free = [name for name in found if split_role(name) == role]
        if role != "train" or whole:
            free = [name for name in free if name not in names.values()]
        if role not in names and len(free) > 1:
            raise DataError(f"data.{role}_split: of {data.source} it could be {listed(free)}: name one")
        if role not in names and free:
            names[role] = free[0]
    if whole:
        names = _whole(names, found)
    if "train" not in names:
        only = f"; to train on it, say data.train_split={found[0]}" if len(found) == 1 else ""
        raise DataError(f"data.train_split: {data.source} has no split 'train', only {listed(found)}{only}")
    if not whole and len(set(names.values())) < len(names):
        raise DataError(
            f"data: one split cannot serve twice, but train, validation and test are {listed(names.values())}"
        )
    return names


def _asked_split(role: str, name: str, found: list[str], source: str) -> str:
    """The split that the recipe names, or the only one whose name means the same."""
    if name in found:
        return name
    same = [each for each in found if each.casefold() == name.casefold()]
    same = same or [each for each in found if split_role(each) is not None and split_role(each) == split_role(name)]
    if len(same) == 1:
        return same[0]
    raise DataError(
        f"data.{role}_split: {source} has no split {name!r}, only {listed(found)}{did_you_mean(name, found)}"
    )


def _whole(names: dict[str, str], found: list[str]) -> dict[str, str]:
    """The splits of a set of which nothing is trained on: `val` is what is measured, with `test` where both are."""
    if not names and len(found) == 1:
        names = {"train": found[0]}
    if not names:
        return {}
    if "val" not in names:
        names = {**names, "val": names.pop("test") if "test" in names else names["train"]}
    return {"train": names["val"], **names}


def _measured_as(name: str, data: Data) -> str:
    role = split_role(name) if data.val_split is None else "val"
    return {"val": "validation", "test": "test"}.get(role or "", "all")


def _note_left_over(opened: Mapping[str, Any], names: Mapping[str, str], data: Data) -> None:
    """Name the splits that no role was found for, with their images."""
    left = [f"{name!r} ({_size(split)} images)" for name, split in opened.items() if name not in names.values()]
    if left:
        note(f"data.source: {data.source}: passed over: the splits {', '.join(left)}")


def _note_absent(parts: Mapping[str, _Part], classes: tuple[str, ...], where: Mapping[str, str]) -> None:
    for role, part in parts.items():
        absent = [classes[number] for number in np.flatnonzero(class_counts(part.labels, len(classes)) == 0)]
        if absent:
            note(f"{where[role]} has no image of the class {listed(absent, 3)}")


def _resolved(split: Any, where: str) -> Any:
    """A split with known columns and at least one row."""
    if isinstance(split, datasets.IterableDataset):
        split = split if split.features is not None else split._resolve_features()
        if not list(islice(split.select_columns(list(split.features)[:1]), 1)):
            raise DataError(f"{where} is empty")
    elif len(split) == 0:
        raise DataError(f"{where} is empty")
    return split


def _chosen_columns(split: Any, columns: list[str], where: str) -> Any:
    """Only these columns, of which the first holds images, as encoded bytes or paths."""
    missing = [name for name in columns if name not in split.features]
    if missing:
        raise DataError(f"{where} has no column {listed(missing)}, only {listed(split.features)}")
    return split.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))


def _encode_labels(
    splits: Mapping[str, Any], label: str, data: Data, where: Mapping[str, str], network: Network | None
) -> tuple[dict[str, _Part], tuple[str, ...]]:
    """Class numbers that all splits agree on; a test split that nobody asked for and that has no labels is dropped."""
    column = {role: f"column {label!r} of {where[role]}" for role in splits}
    values = {role: column_values(split, label) for role, split in splits.items()}
    if "test" in values and data.test_split is None and all(value is None or value == [] for value in values["test"]):
        note(f"{where['test']} has no labels: its {len(values['test'])} images are passed over")
        del values["test"]
    several, feature = data.task == "multilabel", splits["train"].features[label]
    if several:
        values = label_sets(values, column)
    else:
        for role in values:
            check_labelled(values[role], column[role])
    coding = Coding.of_feature(element(feature) if several else feature, data.classes, column["train"])
    single = {role: [*chain.from_iterable(part)] if several else part for role, part in values.items()}
    if network is not None and network.class_names:
        every = [*chain.from_iterable(single.values())]
        coding = Coding.of_network(network.class_names, every, data.classes)
        _check_known(coding, every, data.source)
    elif coding is None:
        coding = Coding.of_values(single["train"])
    parts = {}
    for role in values:
        encode = partial(multi_hot, coding=coding) if several else coding.encode
        labels = encode(values[role], where=column[role], against=where["train"])
        parts[role] = _Part(with_labels(splits[role], label, coding.classes, labels), labels)
    if not several:
        note_separated(coding.classes, column["train"])
    return parts, coding.classes


def _check_known(coding: Coding, values: list[Any], source: str) -> None:
    """Refuse data with a class that the network does not know."""
    found = sorted({str(value) for value in values})
    if not {*values} <= {*coding.values}:
        raise DataError(
            f"data.source={source} has the classes {', '.join(found[:5])}... ({len(found)}), but the network predicts "
            f"{', '.join(coding.classes[:5])}... ({len(coding.classes)}): measure it on data with the same classes"
        )


def _readable(part: _Part, image: str, data: Data, where: str, skipped: list[str]) -> _Part:
    """The part without the images that are found unreadable, which are added to `skipped`; or an error."""
    broken = unreadable_images(part.split, image, where, data.max_pixels)
    if not broken:
        return part
    if data.on_error == "raise":
        raise DataError(f"{next(iter(broken.values()))} (data.on_error=skip leaves such images out)")
    skipped.extend(broken.values())
    if len(broken) == len(part.labels):
        raise DataError(f"{where} has no readable image: {next(iter(broken.values()))}")
    return part.select(np.setdiff1d(np.arange(len(part.labels)), list(broken)))


def _hold_out(part: _Part, classes: tuple[str, ...], data: Data, seed: int) -> tuple[_Part, _Part]:
    counts = class_counts(part.labels)
    if counts.max() == 1:
        raise DataError(
            f"data.val_fraction: each of the {len(classes)} classes has one image, of which none can be held out: add "
            "images, or name a validation split by data.val_split"
        )
    kept, held = hold_out(part.labels, data.val_fraction, seed)
    left = class_counts(part.labels[kept], len(counts))
    spent = np.flatnonzero(((data.val_fraction * counts > counts - 0.5) & (counts > 1)) | ((counts > 0) & (left == 0)))
    if len(spent):
        name, count = classes[spent[0]], counts[spent[0]]
        raise DataError(
            f"data.val_fraction={data.val_fraction:g} leaves the class {name!r} ({count} images) without a training "
            "image: lower it, or name a validation split by data.val_split"
        )
    if len(held) == 0:
        raise DataError(
            f"data.val_fraction={data.val_fraction:g} of {len(part.labels)} images holds out none: raise it, to "
            f"{np.ceil(100 / len(part.labels)) / 100:g}, say"
        )
    return part.select(kept), part.select(held)


def _subset(part: _Part, data: Data, seed: int) -> _Part:
    if data.train_samples is None or data.train_samples >= len(part.labels):
        return part
    classes = np.count_nonzero(class_counts(part.labels))
    enough = data.train_samples >= classes
    rows = subset(part.labels, data.train_samples, seed) if enough else np.arange(0)
    if np.count_nonzero(class_counts(part.labels[rows])) < classes:
        raise DataError(
            f"data.train_samples={data.train_samples} leaves a class without a training image: "
            f"there are {classes} classes"
        )
    return part.select(rows)


def _stream_splits(
    splits: dict[str, Any],
    names: dict[str, str],
    data: Data,
    image: str,
    label: str,
    network: Network | None,
    whole: bool,
) -> ImageSplits:
    """Splits that cannot be counted beforehand: the column's type or `data.classes` must tell the classes."""
    where = f"column {label!r} of split {names['train']!r} of {data.source}"
    if "val" not in splits:
        raise DataError(f"{data.source}: a stream needs a validation split of its own, found {listed(names.values())}")
    if data.train_samples is not None:
        raise DataError("data.train_samples cannot be chosen by class from a stream: unset it or data.streaming")
    several, feature = data.task == "multilabel", splits["train"].features[label]
    if several and not is_list(feature):
        raise DataError(f"{where} holds no lists, which a stream of data.task=multilabel needs: unset data.streaming")
    coding = Coding.of_feature(element(feature) if several else feature, data.classes, where)
    if network is not None and network.class_names:
        coding = Coding.of_names(network.class_names)
    if coding is None:
        raise DataError(f"{where} does not tell the classes of a stream: set data.classes to their number or names")
    if len(coding.classes) < 2 and not several:
        raise DataError(f"{where} has one class only, {listed(coding.classes)}: classification needs two or more")
    feature = label_feature(coding.classes, several=several)
    for role, split in splits.items():
        found = split.features[label]
        if isinstance(element(found), datasets.ClassLabel) and found != feature:
            raise DataError(f"split {names[role]!r} of {data.source} has other classes than split {names['train']!r}")
    cast = {role: split.cast_column(label, feature) for role, split in splits.items()}
    levels = network.levels if network is not None else {}
    return ImageSplits(
        cast["train"],
        cast["val"],
        cast.get("test"),
        coding.classes,
        image,
        label,
        data.source,
        names,
        levels=levels or find_levels(splits["train"], image),
        measured_as=_measured_as(names["val"], data) if whole else "validation",
    )


def _identity(split: Any, image: str, label: str, source: str) -> Iterator[bytes]:
    """What tells a split from another one: its labels, the names of its files, some of its contents."""
    yield column_numbers(split, label).tobytes()
    rows = np.unique(np.linspace(0, len(split) - 1, _FINGERPRINT_IMAGES).astype(np.int64))
    raw = [split[int(row)][image] for row in rows]
    if raw[0]["bytes"] is None:
        for value in split.select_columns([image])[:][image]:
            yield _below(value["path"], source).encode()
    for value in raw:
        content = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        yield blake2b(content, digest_size=16).digest()


def _below(path: str, root: str) -> str:
    """A path as it is below a folder, however the two are written; any other as it is."""
    there, base = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    return there.relative_to(base).as_posix() if there.is_relative_to(base) else path


def _size(split: Any) -> str:
    return "a stream of" if isinstance(split, datasets.IterableDataset) else f"{len(split)}"
