"""From the bytes of an image file to 8-bit RGB: any mode, upright, and nothing that is not an image.

Only raster formats are opened: Pillow hands PostScript, for one, to another program.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from bnfinetune.errors import DataError
from bnfinetune.training.data.hints import first_line

_FORMATS: Final = "JPEG PNG WEBP GIF BMP DIB TIFF PPM JPEG2000 AVIF TGA ICO PCX"  # Pillow opens MPO as JPEG
_EXTENSIONS: Final = "jpg jpeg jpe jfif mpo png apng webp gif bmp dib tif tiff ppm pgm pbm pnm jp2 j2k avif tga ico pcx"

EXTENSIONS: Final = frozenset(f".{ending}" for ending in _EXTENSIONS.split())
"""Endings, in lower case, of files that a class folder counts as images."""


def open_image(raw: Mapping[str, Any] | None, where: str, max_pixels: int, shortest: int | None = None) -> Image.Image:
    """Decode one undecoded value of a `datasets.Image` column to upright 8-bit RGB.

    Args:
        raw: `bytes` of a file, or else the `path` of one.
        where: What a message calls the image.
        max_pixels: Largest width times height; refused before anything of that size is allocated.
        shortest: Pixels that the shorter side has to keep; a JPEG is then decoded at 1/2, 1/4 or 1/8 of its size where
            that leaves so many, which takes a fraction of the time. None decodes every pixel.

    Raises:
        DataError: It is missing, truncated, no image, of an unknown format, or larger than `max_pixels`.
    """
    source = _source(raw, where)
    try:
        with _no_warnings(), Image.open(source, formats=_formats()) as image:
            _check_size(image, where, max_pixels)
            if shortest is not None and shortest < min(image.size):
                scale = shortest / min(image.size)
                image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            return to_rgb(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise errors of every type
        raise DataError(f"cannot read the image {where}: {_reason(error)}") from error


def check_header(raw: Mapping[str, Any] | None, where: str, max_pixels: int) -> None:
    """Raise the `DataError` that `open_image` would raise, as far as the first bytes of the image tell."""
    source = _source(raw, where)
    try:
        with _no_warnings(), Image.open(source, formats=_formats()) as image:
            _check_size(image, where, max_pixels)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"cannot read the image {where}: {_reason(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB, turned upright by its EXIF orientation.

    Transparent pixels are laid on white. 16-bit greys are scaled by 255/65535; so are 32-bit integers, which Pillow
    uses for the same files, and floats unless none exceeds 1 (scaled by 255) or 255 (left as they are). Colour
    profiles are not applied, as in timm. Of an animation the first frame is used.
    """
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_wide(image)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _converted(ImageCms.profileToProfile(image, *profiles, outputMode="RGB"))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


@cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in _FORMATS.split() if name in Image.OPEN)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Pillow warns of what does not touch the pixels, such as a broken EXIF block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _source(raw: Mapping[str, Any] | None, where: str) -> io.BytesIO | str:
    if raw is not None and raw.get("bytes") is not None:
        return io.BytesIO(raw["bytes"])
    if raw is None or not raw.get("path"):
        raise DataError(f"{where} holds no image")
    return str(raw["path"])


def _reason(error: Exception) -> str:
    """Why Pillow gave up, without the object addresses and paths that its messages repeat."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a known format"
    if isinstance(error, FileNotFoundError):
        return "the file is gone"
    return first_line(error)


def _check_size(image: Image.Image, where: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"the image {where} has {width} x {height} pixels, more than data.max_pixels={max_pixels}: "
            "shrink or remove it, or raise the limit"
        )


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # a truncated file fails here, and not below
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return image if orientation == 1 else ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image


def _from_wide(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F" and values.max(initial=0.0) <= 1.0:
        values = values * 255
    elif image.mode != "F" or values.max(initial=0.0) > 255:
        values = values / 257
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _converted(image: Image.Image | None) -> Image.Image:
    assert image is not None  # ImageCms returns None only when it converts in place
    return image
