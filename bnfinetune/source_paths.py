"""Whether `data.source` or a checkpoint is a path that is missing: told from names alone, before anything is loaded."""

from __future__ import annotations

import glob
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from bnfinetune.errors import CheckpointError, DataError, nearest

DEMOS: Final = ("demo", "demo-characters", "demo-domains")
FILE_ENDINGS: Final = (".parquet", ".tar")
HUB_UNREACHABLE: Final = (
    "the Hugging Face hub cannot be reached: ways out: a local folder of images, a save_to_disk folder, or a cache "
    "filled on another machine with HF_HUB_OFFLINE=1"
)
_HUB_NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_CONNECTING: Final = 5.0  # seconds
_PROXIES: Final = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def check_source(source: str) -> None:
    """Raise a `DataError` if `source` can only be a folder or file, and is not there.

    A name such as `user/flowers` may also be one of a hub; where no hub can be reached and no copy of it is cached, the
    answer is the same.
    """
    check_path(source)
    if _may_be_missing(source) and not _is_cached(source) and not hub_answers():
        hint = _hint(Path(source))
        raise DataError(f"data.source: the dataset {source!r} is no local folder{hint}, and {HUB_UNREACHABLE}")


def check_path(source: str) -> None:
    """Raise a `DataError` if `source` cannot be a name of a hub, and is no folder or file that is there."""
    path = Path(source)
    outside = source.startswith((".", "~")) or path.is_absolute() or _HUB_NAME.fullmatch(source) is None
    beside_others = path.parent != Path() and path.parent.is_dir()
    if _may_be_missing(source) and (outside or beside_others):
        raise DataError(f"data.source: there is no folder or file {_printable(source)}{_hint(path)}")


def check_checkpoint(checkpoint: str) -> None:
    """Raise a `CheckpointError` if a checkpoint is no folder."""
    if os.path.isfile(checkpoint):
        folder = os.path.dirname(checkpoint) or "."
        raise CheckpointError(f"checkpoint: {checkpoint} is a file; name the folder it lies in: checkpoint={folder}")
    if not os.path.isdir(checkpoint):
        raise CheckpointError(f"checkpoint: there is no folder {checkpoint}")


def _may_be_missing(source: str) -> bool:
    """Whether a source is neither there, nor a demo, nor a pattern of files."""
    by_name = Path(source).suffix.lower() in FILE_ENDINGS or glob.has_magic(source)
    return source not in DEMOS and not by_name and not os.path.exists(source)


def _hint(path: Path) -> str:
    return near_name(path.name, [*siblings(path), *(DEMOS if path.parent == Path() else ())])


def siblings(path: Path) -> list[str]:
    """What lies in the folder that a path would lie in."""
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []


def near_name(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice nearest to a name in any case, or nothing; quoted, whatever it holds."""
    folded = {choice.casefold(): choice for choice in choices}
    near = nearest(name.casefold(), folded)
    return f"; did you mean {folded[near]!r}?" if near else ""


def _is_cached(name: str) -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    return (cache / name.replace("/", "___")).is_dir()


def hub_answers() -> bool:
    """Whether the hub may be asked: no, where nothing can be connected to at its address."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname or "", port), timeout=_CONNECTING).close()
    except (OSError, ValueError):
        return False
    return True


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)
