"""Lines that a user should read although nothing is wrong: what was passed over, and what was taken for what."""

from __future__ import annotations

import logging
import os

_LOGGER = logging.getLogger("bnfinetune")


def note(text: str) -> None:
    """Say a line once, on rank 0: on stderr, or wherever a program's own `logging` sends warnings."""
    if os.environ.get("RANK", "0") == "0":
        _LOGGER.warning("bnfinetune: note: %s", text)
