"""Whether `data.source` is a path that is missing: told from names and folders alone, before anything heavy is loaded."""

from __future__ import annotations

import difflib
import glob
import os
import re
import socket
from pathlib import Path
from typing import Final

from bnfinetune.errors import DataError

DEMOS: Final = ("demo", "demo-characters", "demo-domains")
FILE_ENDINGS: Final = (".parquet", ".tar")
HUB_UNREACHABLE: Final = (
    "the Hugging Face hub cannot be reached: ways out: a local folder of images, a save_to_disk folder, or a cache "
    "filled on another machine with HF_HUB_OFFLINE=1"
)
_PROXIES: Final = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def check_source(source: str) -> None:
    """Raise a `DataError` if `source` can only be a folder or file, and is not there.

    A name such as `user/flowers` may also be one of a hub; where no hub can be reached and no copy of it is cached, the
    answer is the same.
    """
    path = Path(source)
    if source in DEMOS or os.path.exists(source) or path.suffix.lower() in FILE_ENDINGS or glob.has_magic(source):
        return
    hint = near_name(path.name, (*siblings(path), *(DEMOS if path.parent == Path() else ())))
    if path.is_absolute() or source.startswith((".", "~")) or not _can_be_hub_name(source) or _is_beside_others(path):
        raise DataError(f"data.source: there is no folder or file {_printable(source)}{hint}")
    if not _is_cached(source) and not _hub_answers():
        raise DataError(f"data.source: the dataset {source!r} is no local folder, and {HUB_UNREACHABLE}{hint}")


def siblings(path: Path) -> list[str]:
    """What lies in the folder that a path would lie in."""
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []


def near_name(name: str, choices: tuple[str, ...] | list[str]) -> str:
    """`; did you mean 'x'?` for the choice nearest to a name, or nothing."""
    folded = {choice.casefold(): choice for choice in choices}
    matches = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"; did you mean {folded[matches[0]]!r}?" if matches else ""


def _can_be_hub_name(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source, re.ASCII) is not None


def _is_beside_others(path: Path) -> bool:
    """Whether a missing path lies in a folder that is there, so that no name of a hub is meant."""
    return path.parent != Path() and path.parent.is_dir()


def _is_cached(name: str) -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    return (cache / name.replace("/", "___")).is_dir()


def _hub_answers() -> bool:
    """Whether the hub may be asked: no, where its name cannot even be looked up."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").partition("://")[2].partition("/")[0]
    try:
        socket.getaddrinfo(host.partition(":")[0], 443)
    except OSError:
        return False
    return True


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)
