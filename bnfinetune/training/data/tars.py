"""Webdataset shards: tar files in which neighbours of one name, `0001.jpg` and `0001.cls`, are one sample.

Labels may be numbers or names in a text member, or values of a JSON member; the image may be of a format of its own in
every sample.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Final

import datasets

from bnfinetune.errors import DataError
from bnfinetune.training.data.images import image_endings
from bnfinetune.training.data.walking import printable

_TEXTS: Final = ("cls", "cls2", "txt", "text", "label", "class", "target", "index", "id")
_JSON: Final = "json"
_IMAGE: Final = "image"
_PEEK: Final = 1_000  # samples of the first shard of a stream that tell which columns there are

Sample = dict[str, bytes]  # members by what follows the first dot of their names


def read_tars(files: list[str], *, streaming: bool) -> Any:
    """The samples of shards, as a `datasets.Dataset` or, streaming, an `IterableDataset` of as many shards.

    Raises:
        DataError: A shard is damaged, or holds no image.
    """
    peeked = _samples(files[0]) if streaming else (sample for file in files for sample in _samples(file))
    images, kinds = _columns(islice(peeked, _PEEK) if streaming else peeked)
    if not images:
        raise DataError(f"data.source: {printable(files[0])} holds no image beside which a label lies")
    features = datasets.Features(
        {name: datasets.Image(decode=False) for name in images.values()}
        | {name: datasets.Value(kind) for name, kind in kinds.items()}
    )
    # sizes and times make a cached copy known for a stale one
    shards = [(file, os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files]
    options: dict[str, Any] = {"features": features, "gen_kwargs": {"shards": shards, "images": images, "kinds": kinds}}
    return (datasets.IterableDataset if streaming else datasets.Dataset).from_generator(_rows, **options)


def _columns(samples: Iterable[Sample]) -> tuple[dict[str, str], dict[str, str]]:
    """The column of every image member, and the types of the others."""
    fields: set[str] = set()
    several = False
    kinds: dict[str, str] = {}
    for sample in samples:
        found = {field for field in sample if _is_image(field)}
        several |= len(found) > 1
        fields |= found
        for name, value in _values(sample).items():
            kind = _kind(value)
            kinds[name] = kind if kinds.get(name, kind) == kind else "string"
    if several or len(fields) == 1:
        return {field: field for field in sorted(fields)}, kinds
    return dict.fromkeys(sorted(fields), _IMAGE), kinds


def _rows(shards: list[tuple[str, int, int]], images: Mapping[str, str], kinds: Mapping[str, str]) -> Iterator[Any]:
    for file, *_ in shards:
        for number, sample in enumerate(_samples(file)):
            row: dict[str, Any] = dict.fromkeys((*images.values(), *kinds))
            for field, column in images.items():
                if field in sample:
                    row[column] = {"bytes": sample[field], "path": f"{number}.{field}"}
            for name, value in _values(sample).items():
                if name in kinds:
                    row[name] = _typed(value, kinds[name], name, file)
            if any(row[column] is not None for column in images.values()):
                yield row


def _samples(file: str) -> Iterator[Sample]:
    """The samples of one shard; members that no column can come of are not read."""
    with tarfile.open(file) as archive:
        key, sample = "", Sample()
        for member in archive:
            path = PurePosixPath(member.name)
            stem, dot, field = path.name.partition(".")
            if not member.isfile() or not stem or not dot or path.name.startswith("._") or "__MACOSX" in path.parts:
                continue
            if sample and str(path.parent / stem) != key:
                yield sample
                sample = Sample()
            key, field = str(path.parent / stem), field.lower()
            if _is_image(field) or field in (*_TEXTS, _JSON):
                content = archive.extractfile(member)
                sample[field] = content.read() if content is not None else b""
        if sample:
            yield sample


def _values(sample: Sample) -> dict[str, Any]:
    """The values beside the image: texts, whole numbers where they are written so, and those in a JSON mapping."""
    values: dict[str, Any] = {}
    if _JSON in sample:
        found = json.loads(sample[_JSON])
        if isinstance(found, dict):
            values |= {name: value for name, value in found.items() if isinstance(value, str | int | float)}
        elif isinstance(found, str | int | float):
            values[_JSON] = found
    for field in sample:
        if field in _TEXTS:
            text = sample[field].decode("utf-8").strip()
            values[field] = int(text) if text.isdecimal() and str(int(text)) == text else text
    return values


def _kind(value: Any) -> str:
    return {bool: "bool", int: "int64", float: "float64"}.get(type(value), "string")


def _typed(value: Any, kind: str, name: str, file: str) -> Any:
    if kind == "string":
        return str(value)
    if _kind(value) != kind:
        raise DataError(f"{printable(file)}: {name} is {value!r} in one sample, and a number in those before it")
    return value


def _is_image(field: str) -> bool:
    return f".{field.rpartition('.')[2]}" in image_endings()
