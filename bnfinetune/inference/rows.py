"""Predictions as text: a line for eyes, a JSON object, or a row of a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

RowFormat = Literal["table", "jsonl", "csv"]
_BETWEEN_LABELS: Final = "|"  # as label files have it that train with data.task=multilabel


def as_rows(records: Iterable[Mapping[str, Any]], form: RowFormat) -> Iterator[str]:
    """Lines without their ends, each as soon as its record is there; CSV begins with a header.

    Args:
        records: What `Prediction.record` gives of each image.
        form: `table` (path and labels with percentages), `jsonl`, or `csv`.
    """
    for number, record in enumerate(records):
        if form == "csv" and not number:
            yield _csv(_header(record))
        if form == "csv":
            yield _csv(_cells(record))
        else:
            yield json.dumps(record) if form == "jsonl" else _line(record)


def _line(record: Mapping[str, Any]) -> str:
    guesses = record.get("labels", record["top"])
    ranked = "  ".join(f"{guess['label']} {guess['probability']:.1%}" for guess in guesses)
    return f"{record['path']}  {ranked or '(no label)'}"


def _header(record: Mapping[str, Any]) -> list[str]:
    places = [f"{kind}_{place}" for place in range(1, len(record["top"]) + 1) for kind in ("label", "probability")]
    return ["path", *(["labels"] if "labels" in record else ["label", "probability"]), *places]


def _cells(record: Mapping[str, Any]) -> list[Any]:
    ranked = [each[kind] for each in record["top"] for kind in ("label", "probability")]
    if "labels" in record:
        return [record["path"], _BETWEEN_LABELS.join(each["label"] for each in record["labels"]), *ranked]
    return [record["path"], record["label"], record["probability"], *ranked]


def _csv(cells: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()
