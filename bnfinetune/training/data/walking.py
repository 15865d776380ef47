"""The image files below a folder, in the order of their names, and a count of everything that is passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bnfinetune.errors import DataError
from bnfinetune.training.data.images import image_endings, missing_decoder

_JUNK = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")  # what systems leave behind


class PassedOver:
    """What a walk left out, by kind: hidden files, links to nothing, files of other formats."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, entry: os.DirEntry[str]) -> None:
        """Count an entry of a folder that is no image to be used."""
        ending = os.path.splitext(entry.name)[1].lower()
        if _is_hidden(entry.name):
            self.counts["hidden"] += ending in image_endings() or entry.is_dir()
        elif entry.is_symlink() and not entry.is_file():
            self.counts["links to nothing"] += 1
        else:
            remedy = missing_decoder(ending)
            shown = printable(ending or "without ending") + (f" (to read these: {remedy})" if remedy else "")
            self.counts[shown] += 1

    def __str__(self) -> str:
        """`90 .heic (to read these: pip install pillow-heif), 2 .txt`; empty if nothing was passed over."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common() if count)


def images_below(
    folder: Path, passed: PassedOver | None = None, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Path]:
    """Image files below a folder in the order of their names; a link back to a folder `above` is not followed.

    Raises:
        DataError: A folder cannot be read.
    """
    here = above | {identity(folder)}
    if len(here) == len(above):
        return
    for entry in entries(folder, passed):
        if entry.is_dir():
            yield from images_below(Path(entry.path), passed, here)
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in image_endings():
            yield Path(entry.path)
        elif passed is not None:
            passed.add(entry)


def identity(folder: Path) -> tuple[int, int]:
    """What tells a folder from others under whatever names links give it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def has_image(folder: Path) -> bool:
    """Whether an image lies anywhere below a folder."""
    return next(images_below(folder), None) is not None


def folders_in(root: Path, passed: PassedOver | None = None) -> list[Path]:
    """The folders of a folder, in the order of their names."""
    return [Path(entry.path) for entry in entries(root, passed) if entry.is_dir()]


def entries(folder: Path, passed: PassedOver | None = None) -> list[os.DirEntry[str]]:
    """What lies in a folder, in the order of names, without what is hidden or left behind by a system."""
    try:
        with os.scandir(folder) as found:
            all_of_it = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {printable(folder)}: {error.strerror}") from error
    hidden = [entry for entry in all_of_it if _is_hidden(entry.name)]
    if passed is not None:
        for entry in hidden:
            passed.add(entry)
    return [entry for entry in all_of_it if not _is_hidden(entry.name)]


def printable(path: Path | str) -> str:
    """A path or name as valid Unicode on one line; the rare file name that is neither is escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", *_JUNK))
