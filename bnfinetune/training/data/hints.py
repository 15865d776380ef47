"""Pieces of error messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice nearest to a name, or nothing."""
    matches = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def listed(names: Iterable[object], limit: int = 8) -> str:
    """Names in one line, the first `limit` of them, quoted, on one line whatever they hold."""
    texts = [repr(name) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
