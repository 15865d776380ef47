"""What `data.source` may be, and how each kind is opened: a table of splits by name, images still encoded.

Everything is a `datasets.Dataset` (or `IterableDataset`) underneath. No loading script is ever run.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import datasets

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.source_paths import DEMOS, FILE_ENDINGS, HUB_UNREACHABLE, check_source, near_name, siblings
from bnfinetune.training.data.folders import WHOLE, read_class_folders
from bnfinetune.training.data.hints import first_line, listed
from bnfinetune.training.data.metadata import read_metadata
from bnfinetune.training.data.split_names import split_role, split_word
from bnfinetune.training.data.tars import read_tars
from bnfinetune.training.data.walking import PassedOver, entries, printable

_HUB_TIMEOUT: Final = 10.0  # seconds
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_source(data: Data) -> dict[str, Any]:
    """Open `data.source`.

    Returns:
        Splits by name: `datasets.Dataset`, or `IterableDataset` for a stream of parquet, webdataset or hub data.

    Raises:
        DataError: It is missing, unreachable, damaged, or of no kind that is known.
    """
    source = data.source
    if source in DEMOS:
        return _open_demo(source)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, data)
    if path.suffix.lower() in FILE_ENDINGS or glob.has_magic(source):
        return _open_pattern(source, data)
    if path.exists():
        raise DataError(f"data.source: the file {printable(path)} is neither {' nor '.join(FILE_ENDINGS)}")
    if not _is_cached(source):
        check_source(source)
    return _open_hub(source, data)


def _open_demo(name: str) -> dict[str, Any]:
    from bnfinetune.demo import load_characters, load_digits, load_domains

    loaders = {"demo": load_digits, "demo-characters": load_characters, "demo-domains": load_domains}
    return dict(loaders[name]())


def _open_folder(root: Path, data: Data) -> dict[str, Any]:
    """A `save_to_disk` folder, class folders, images listed in a metadata file, parquet or webdataset files."""
    where = f"data.source: the folder {printable(root)}"
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _by_split(_load(where, lambda: datasets.load_from_disk(str(root))))
    splits = read_metadata(root, data) or read_class_folders(root, data)
    if splits is not None:
        return dict(splits)
    passed = PassedOver()
    for ending in FILE_ENDINGS:
        files = sorted(_files_below(root, ending, passed))
        if files:
            return _read_files(files, where, data)
    found = f" (found: {passed})" if str(passed) else ""
    raise DataError(f"{where} holds no class folders with images, nor parquet, webdataset or save_to_disk data{found}")


def _files_below(folder: Path, ending: str, passed: PassedOver) -> Iterator[str]:
    for entry in entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path), ending, passed)
        elif entry.name.lower().endswith(ending):
            yield entry.path
        elif ending == FILE_ENDINGS[-1]:
            passed.add(entry)


def _open_pattern(pattern: str, data: Data) -> dict[str, Any]:
    """Parquet or webdataset files by name, `*` and `{000..127}`."""
    there, rest = _literal_part(pattern)
    names = (os.path.join(glob.escape(there), each) for each in _expand_braces(rest))
    files = [pattern] if not rest else sorted(file for name in names for file in glob.glob(name, recursive=True))
    if not files:
        hint = near_name(Path(pattern).name, siblings(Path(pattern)))
        raise DataError(f"data.source: no file matches {printable(pattern)}{hint}")
    endings = {Path(name).suffix.lower() for name in files}
    if len(endings) != 1 or not endings <= set(FILE_ENDINGS):
        raise DataError(
            f"data.source: {printable(pattern)} matches files of the kinds {listed(sorted(endings))}, "
            f"not of one of {listed(FILE_ENDINGS)}"
        )
    return _read_files(files, f"data.source: {printable(pattern)}", data)


def _literal_part(pattern: str) -> tuple[str, str]:
    """A pattern as what is there under that very name, which may hold brackets or braces, and the rest."""
    there, parts = "", list(Path(pattern).parts)
    while parts and os.path.exists(os.path.join(there, parts[0])):
        there = os.path.join(there, parts.pop(0))
    return there, os.path.join("", *parts)


def _read_files(files: list[str], where: str, data: Data) -> dict[str, Any]:
    """Read files of one kind, each split by itself.

    Read together, `datasets` would take the types of all from the first, and class numbers of the others for its.
    """
    empty = [name for name in files if os.path.getsize(name) == 0]
    if empty:
        raise DataError(f"data.source: the file {printable(empty[0])} is empty")

    def load(names: list[str]) -> Any:
        if names[0].lower().endswith(".tar"):
            return read_tars(names, streaming=data.streaming)
        literal = [glob.escape(name) for name in names]
        return datasets.load_dataset("parquet", data_files={"train": literal}, split="train", streaming=data.streaming)

    return {split: _load(where, partial(load, names)) for split, names in _files_by_split(files).items()}


def _files_by_split(files: list[str]) -> dict[str, list[str]]:
    """Files by the split in their name, or else by the folder they lie in; all are `train` if neither says one.

    A word such as `test` in the name of a single file says nothing, unless it is all that the name says.
    """
    of_name = split_role if len(files) == 1 else split_word
    by_name = _grouped(files, lambda path: of_name(path.stem))
    by_folder = _grouped(files, lambda path: path.parent.name if split_role(path.parent.name) else None)
    splits = by_name if set(by_name) != {None} else by_folder
    unnamed = splits.pop(None, [])
    if unnamed and splits:
        raise DataError(
            f"data.source: the name of {printable(unnamed[0])} holds no split, but others hold {listed(sorted(splits))}"
        )
    return splits or {WHOLE: unnamed}


def _grouped(files: list[str], key: Callable[[Path], str | None]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for name in files:
        groups.setdefault(key(Path(name)), []).append(name)
    return groups


def _expand_braces(pattern: str) -> Iterator[str]:
    """Webdataset's `shard-{000..127}.tar`, as one name per number."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expand_braces(f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}")


def _open_hub(name: str, data: Data) -> dict[str, Any]:
    """A data set of the Hugging Face hub, or its copy in the local cache."""
    where = f"data.source: the dataset {name!r}"
    if not _is_cached(name):
        _check_hub(name, where)
    return _by_split(_load(where, lambda: datasets.load_dataset(name, data.config, streaming=data.streaming)))


def _is_cached(name: str) -> bool:
    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def _check_hub(name: str, where: str) -> None:
    """Ask the hub once, since `datasets` would retry for half a minute before it says that it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    hint = near_name(name, [*DEMOS, *siblings(Path(name))])
    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(f"{where} is neither a local folder nor on the Hugging Face hub{hint}") from error
    except Exception as error:  # whatever the HTTP client of the day raises, and offline mode
        raise DataError(f"{where} is no local folder, and {HUB_UNREACHABLE}{hint or ''}") from error


def _load(where: str, load: Callable[[], Any]) -> Any:
    """Call into `datasets`, quietly unless on a terminal, and make one line of whatever it raises."""
    try:
        with _quiet_progress():
            return load()
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of many libraries: HTTP, Arrow, tar, JSON
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # type: ignore[assignment]
        reason = first_line(cause)
        if reason.endswith("corresponds to no data!"):  # of files without rows, `datasets` makes no split
            raise DataError(f"{where} is empty") from error
        raise DataError(f"{where} cannot be loaded: {reason}") from error


@contextmanager
def _quiet_progress() -> Iterator[None]:
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _by_split(loaded: Any) -> dict[str, Any]:
    return dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
