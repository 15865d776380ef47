"""What a user hands in to be looked at: files, folders and images from memory, as upright RGB images one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Final

from PIL import Image

from bnfinetune.errors import DataError
from bnfinetune.notes import note
from bnfinetune.training.data.images import open_image, to_rgb, wide_extremes
from bnfinetune.training.data.levels import Levels, levels_of
from bnfinetune.training.data.walking import PassedOver, images_below, printable

Input = str | PathLike[str] | Image.Image
_LEVEL_IMAGES: Final = 256  # files that are looked at for values of more than 8 bits, where the network tells no levels


def gather(images: Input | Iterable[Input]) -> list[Path | Image.Image]:
    """One or many inputs as a list, folders replaced by the images below them.

    Raises:
        DataError: A path does not exist, a folder holds no image, or something is neither a path nor an image.
    """
    several = [images] if isinstance(images, str | PathLike | Image.Image) else images
    found: list[Path | Image.Image] = []
    for each in several:
        if isinstance(each, Image.Image):
            found.append(each)
        elif isinstance(each, str | PathLike):
            found += _files(Path(each))
        else:
            raise DataError(f"predict takes paths and Pillow images, not a {type(each).__name__}")
    return found


def read_levels(inputs: Sequence[Path | Image.Image]) -> Levels:
    """Which values of 16-bit and float images are black and white, for a network that was trained on others."""
    files = [each for each in inputs if isinstance(each, Path)]
    some = files[:: max(1, len(files) // _LEVEL_IMAGES)]
    return levels_of(found for file in some if (found := wide_extremes({"path": str(file)})) is not None)


def readable(
    inputs: Sequence[Path | Image.Image], max_pixels: int, levels: Levels, unreadable: list[str], *, skip: bool
) -> Iterator[tuple[str | None, Image.Image]]:
    """The images that can be read, with their paths; with `skip`, what is wrong with others is noted and listed.

    Args:
        inputs: From `gather`.
        max_pixels: Largest width times height of a file.
        levels: Values of 16-bit and float images that become 0 and 255.
        unreadable: What is wrong with each image that was left out is added to it.
        skip: Leave out what cannot be read.

    Raises:
        DataError: An image cannot be read, without `skip`.
    """
    for each in inputs:
        if isinstance(each, Image.Image):
            yield None, to_rgb(each, levels)
            continue
        try:
            image = open_image({"path": str(each)}, printable(each), max_pixels, levels=levels)
        except DataError as error:
            if not skip:
                raise
            unreadable.append(str(error))
            if len(inputs) > 1:
                note(f"predict: {error}")
        else:
            yield str(each), image


def _files(path: Path) -> list[Path]:
    """The image files at or below `path`, in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"predict: there is no file or folder {printable(path)}")
    passed = PassedOver()
    found = list(images_below(path, passed))
    if not found:
        beside = f", but {passed}" if str(passed) else ""
        raise DataError(f"predict: the folder {printable(path)} holds no image{beside}")
    if str(passed):
        note(f"predict: passed over in {printable(path)}: {passed}")
    return found
