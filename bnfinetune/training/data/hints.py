"""Pieces of error messages."""

from __future__ import annotations

from collections.abc import Iterable

from bnfinetune.errors import nearest


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice nearest to a name, or nothing."""
    near = nearest(name, choices)
    return f"; did you mean {near!r}?" if near else ""  # quoted: it comes from the data and may hold anything


def listed(names: Iterable[object], limit: int = 8) -> str:
    """Names in one line, the first `limit` of them, quoted, on one line whatever they hold."""
    texts = [repr(name) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
