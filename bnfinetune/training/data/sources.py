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
from bnfinetune.training.data.folders import SPLIT_NAMES, printable, read_class_folders
from bnfinetune.training.data.hints import did_you_mean, first_line, listed

DEMOS: Final = ("demo", "demo-characters", "demo-domains")

_BUILDERS: Final = {".parquet": "parquet", ".tar": "webdataset"}
_METADATA: Final = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # that list images and their labels
_HUB_TIMEOUT = 10.0  # seconds
_SPLIT_IN_NAME = re.compile(rf"(?:^|[^a-z])({'|'.join(SPLIT_NAMES)})(?:[^a-z]|$)")
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
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, data)
    if path.suffix.lower() in _BUILDERS or glob.has_magic(source):
        return _open_pattern(str(path), data)
    if path.exists():
        raise DataError(f"data.source: the file {printable(path)} is neither {' nor '.join(_BUILDERS)}")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or _is_inside_folder(path):
        raise DataError(f"data.source: there is no folder or file {printable(source)}{_sibling_hint(path)}")
    return _open_hub(source, data)


def _is_inside_folder(path: Path) -> bool:
    """Whether a missing path lies in a folder that is there, so that no name on a hub is meant."""
    return path.parent != Path() and path.parent.is_dir()


def _open_demo(name: str) -> dict[str, Any]:
    from bnfinetune.demo import load_characters, load_digits, load_domains

    loaders = {"demo": load_digits, "demo-characters": load_characters, "demo-domains": load_domains}
    return dict(loaders[name]())


def _open_folder(root: Path, data: Data) -> dict[str, Any]:
    """A `save_to_disk` folder, class folders, images listed in a metadata file, parquet or webdataset files."""
    where = f"data.source: the folder {printable(root)}"
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _by_split(_load(where, lambda: datasets.load_from_disk(str(root))))
    if any((root / split / name).is_file() for split in ("", *SPLIT_NAMES) for name in _METADATA):
        return _by_split(_load(where, lambda: datasets.load_dataset("imagefolder", data_dir=str(root))))
    splits = read_class_folders(root, data)
    if splits is not None:
        return dict(splits)
    for ending in _BUILDERS:
        files = sorted(str(path) for path in root.rglob(f"*{ending}"))
        if files:
            return _read_files(files, where, data)
    raise DataError(f"{where} holds no class folders with images, nor parquet, webdataset or save_to_disk data")


def _open_pattern(pattern: str, data: Data) -> dict[str, Any]:
    """Parquet or webdataset files by name, `*` and `{000..127}`."""
    files = sorted(name for each in _expand_braces(pattern) for name in glob.glob(each, recursive=True))
    if os.path.isfile(pattern):  # whose name may hold brackets
        files = [pattern]
    if not files:
        raise DataError(f"data.source: no file matches {printable(pattern)}{_sibling_hint(Path(pattern))}")
    endings = {Path(name).suffix.lower() for name in files}
    if len(endings) != 1 or not endings <= set(_BUILDERS):
        raise DataError(
            f"data.source: {printable(pattern)} matches files of the kinds {listed(sorted(endings))}, "
            f"not of one of {listed(_BUILDERS)}"
        )
    return _read_files(files, f"data.source: {printable(pattern)}", data)


def _read_files(files: list[str], where: str, data: Data) -> dict[str, Any]:
    """Read files of one kind, each split by itself.

    Read together, `datasets` would take the types of all from the first, and class numbers of the others for its.
    """
    empty = [name for name in files if os.path.getsize(name) == 0]
    if empty:
        raise DataError(f"data.source: the file {printable(empty[0])} is empty")
    builder = _BUILDERS[Path(files[0]).suffix.lower()]

    def load(names: list[str]) -> Any:
        return datasets.load_dataset(builder, data_files={"train": names}, split="train", streaming=data.streaming)

    return {split: _load(where, partial(load, names)) for split, names in _files_by_split(files).items()}


def _files_by_split(files: list[str]) -> dict[str, list[str]]:
    """Files by the split in their name, or else by the folder they lie in; all are `train` if neither says one."""
    by_name = _grouped(files, lambda path: (found := _SPLIT_IN_NAME.search(path.stem.lower())) and found.group(1))
    by_folder = _grouped(files, lambda path: path.parent.name if path.parent.name in SPLIT_NAMES else None)
    splits = by_name if set(by_name) != {None} else by_folder
    unnamed = splits.pop(None, [])
    if unnamed and splits:
        raise DataError(
            f"data.source: the name of {printable(unnamed[0])} holds no split, but others hold {listed(sorted(splits))}"
        )
    return splits or {"train": unnamed}


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

    hint = did_you_mean(name, [*DEMOS, *_entries_beside(Path(name))])
    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(f"{where} is neither a local folder nor on the Hugging Face hub{hint}") from error
    except Exception as error:  # whatever the HTTP client of the day raises, and offline mode
        raise DataError(
            f"{where} is no local folder, and the Hugging Face hub cannot be reached{hint or ':'} ways out: a local "
            "folder of images, a save_to_disk folder, or a cache filled on another machine with HF_HUB_OFFLINE=1"
        ) from error


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


def _sibling_hint(path: Path) -> str:
    return did_you_mean(path.name, _entries_beside(path))


def _entries_beside(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
