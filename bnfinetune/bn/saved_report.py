"""What reports have in common: they print as text and save as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


class SavedReport:
    """Base of what measuring calls return: `print` it, or `save` it."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts."""
        return plain(asdict(self))  # type: ignore[call-overload, no-any-return]

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def plain(value: Any, digits: int = 17) -> Any:
    """A nest of values as JSON can hold it: numbers of so many digits, and None for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item, digits) for item in value]
    return value


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table with columns of even width, the first row its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
