"""Files and folders that are whole or absent, whatever ends the process that writes them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bnfinetune.errors import BnFinetuneError, CheckpointError

MANIFEST = "manifest.json"


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Turn what goes wrong while `what` is written into one line that says that nothing earlier is lost.

    Raises:
        CheckpointError: The system refused to write.
    """
    try:
        yield
    except BnFinetuneError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CheckpointError(
            f"{what} could not be written ({reason}); what was saved before is whole: make room, then go on with "
            "train.resume"
        ) from error


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder, add checksums, and only then give it its name.

    An existing `target` is moved aside first and removed last, so that at every moment a complete folder exists
    under `target` or under its name with `.old` behind it (`complete_folder` looks at both).
    """
    temporary = target.with_name(f".{target.name}.tmp")
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    if not target.parent.exists():
        target.parent.mkdir(parents=True)
        _flush(target.parent.parent)
    temporary.mkdir()
    fill(temporary)
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    write_json(temporary / MANIFEST, {str(p.relative_to(temporary)): _sha256(p) for p in files})
    for path in files:  # safetensors writes for the owner alone; all are to be as readable as what Python writes
        path.chmod((temporary / MANIFEST).stat().st_mode)
    for path in (*files, temporary):
        _flush(path)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    temporary.rename(target)
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def complete_folder(target: Path) -> Path:
    """`target`, or what a crash during its replacement left of it, after comparing every checksum.

    Raises:
        CheckpointError: Neither is there and undamaged.
    """
    problem = f"{target} does not exist"
    for folder in (target, target.with_name(f"{target.name}.old")):
        if folder.is_dir():
            damaged = _damaged(folder)
            if damaged is None:
                return folder
            problem = f"{folder} is damaged: {damaged}"
    raise CheckpointError(problem)


def _damaged(folder: Path) -> str | None:
    """What is wrong with a folder that `write_folder` wrote, or None."""
    try:
        manifest = json.loads(_own_file(folder, MANIFEST).read_text(encoding="utf-8"))
        return next(
            (f"{name} has changed" for name, digest in manifest.items() if _sha256(_own_file(folder, name)) != digest),
            None,
        )
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} or a file that it lists cannot be read ({error})"


def _own_file(folder: Path, name: str) -> Path:
    """A regular file of a folder; a manifest that somebody else wrote may name a device, or leave the folder."""
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise FileNotFoundError(f"no file {name}")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
