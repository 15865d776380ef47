"""From the bytes of an image file to 8-bit RGB: any mode, upright, and nothing that is not an image.

Only raster formats are opened: Pillow hands PostScript, for one, to another program.
"""

from __future__ import annotations

import importlib
import io
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from bnfinetune.errors import DataError
from bnfinetune.training.data.hints import first_line
from bnfinetune.training.data.levels import Kind, Levels, extremes, kind_of, levels_of, to_bytes

_FORMATS: Final = {  # by Pillow's names, in the order they are tried; it opens MPO as JPEG
    "JPEG": "jpg jpeg jpe jfif mpo",
    "PNG": "png apng",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "DIB": "dib",
    "TIFF": "tif tiff",
    "PPM": "ppm pgm pbm pnm",
    "JPEG2000": "jp2 j2k",
    "AVIF": "avif",
    "HEIF": "heic heif hif",
    "ICO": "ico",
    "PCX": "pcx",
    "TGA": "tga",  # last: it begins with nothing that tells it from others
}
_PLUGINS: Final = {"HEIF": "pip install pillow-heif", "AVIF": "pip install 'pillow>=11.3'"}
_BITS, _PLANAR, _EXTRA = 258, 284, 338  # tags of TIFF: bits of each channel, how channels lie, what a fourth one is
_OTHER_ORDER: Final = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_BRANDS: Final = {b"avif": "AVIF", b"avis": "AVIF", **dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1"), "HEIF")}


def open_image(
    raw: Mapping[str, Any] | None,
    where: str,
    max_pixels: int,
    shortest: int | None = None,
    levels: Levels | None = None,
) -> Image.Image:
    """Decode one undecoded value of a `datasets.Image` column to upright 8-bit RGB.

    Args:
        raw: `bytes` of a file, or else the `path` of one.
        where: What a message calls the image.
        max_pixels: Largest width times height; refused before anything of that size is allocated.
        shortest: Pixels that the shorter side has to keep; a JPEG is then decoded at 1/2, 1/4 or 1/8 of its size where
            that leaves so many, which takes a fraction of the time. None decodes every pixel.
        levels: Values of 16-bit and float images that become 0 and 255. An image of a kind that they do not name is
            scaled by its own values.

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
            return _wide_to_rgb(image, source, levels or {}) if _is_wide(image) else to_rgb(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise errors of every type
        raise DataError(f"cannot read the image {where}: {_reason(error, source)}") from error


def wide_extremes(raw: Mapping[str, Any] | None) -> tuple[Kind, tuple[float, float]] | None:
    """The kind and the extreme values of a 16-bit or float image; None for any other, or one that cannot be read."""
    try:
        source = _source(raw, "")
        with _no_warnings(), Image.open(source, formats=_formats()) as image:
            if not _is_wide(image):
                return None
            values = _seen(_wide_values(image, source))
    except Exception:  # what is wrong with an image is said where it is decoded
        return None
    found = extremes(values)
    return None if found is None else (kind_of(values), found)


@cache
def image_endings() -> frozenset[str]:
    """Endings, in lower case, of files that count as images: those of the formats that this machine can decode."""
    return frozenset(f".{ending}" for name in _formats() for ending in _FORMATS[name].split())


def missing_decoder(ending: str) -> str | None:
    """What would let files of an ending, such as `.heic`, be read; None where nothing is known."""
    return next((_PLUGINS[name] for name in _PLUGINS if ending[1:] in _FORMATS[name].split()), None)


def check_header(raw: Mapping[str, Any] | None, where: str, max_pixels: int) -> None:
    """Raise the `DataError` that `open_image` would raise, as far as the first bytes of the image tell."""
    source = _source(raw, where)
    try:
        with _no_warnings(), Image.open(source, formats=_formats()) as image:
            _check_size(image, where, max_pixels)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"cannot read the image {where}: {_reason(error, source)}") from error


def to_rgb(image: Image.Image, levels: Levels | None = None) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB, turned upright by its EXIF orientation.

    Transparent pixels are laid on white. Greys of more than 8 bits are scaled by `levels`, else by their own values.
    Colour profiles are not applied, as in timm. Of an animation the first frame is used.
    """
    image = _upright(image)
    if _is_wide_grey(image):
        return _grey(np.asarray(image), levels or {})
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _converted(ImageCms.profileToProfile(image, *profiles, outputMode="RGB"))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


@cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that this build of Pillow reads, with the plugins that are installed."""
    Image.init()
    for plugin, register in (("pillow_heif", "register_heif_opener"), ("pillow_avif", None)):
        with suppress(ImportError):
            module = importlib.import_module(plugin)
            if register is not None:
                getattr(module, register)()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


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


def _reason(error: Exception, source: io.BytesIO | str) -> str:
    """Why Pillow gave up, without the object addresses and paths that its messages repeat."""
    if isinstance(error, FileNotFoundError):
        return "the file is gone"
    if not isinstance(error, UnidentifiedImageError):
        return first_line(error)
    name = _BRANDS.get(_head(source)[8:12])
    if name is not None and name not in _formats():
        return f"it is a {name} file, which Pillow cannot decode here: {_PLUGINS[name]}"
    return "it is not an image of a known format"


def _head(source: io.BytesIO | str) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:12]
    with open(source, "rb") as file:
        return file.read(12)


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


def _is_wide(image: Image.Image) -> bool:
    """Whether an image that has not been decoded yet holds more than 8 bits a value; colours, in PNG and TIFF files."""
    wide_png = image.format == "PNG" and ";16" in str(vars(image)["tile"])
    return _is_wide_grey(image) or wide_png or _is_wide_tiff(image)


def _is_wide_tiff(image: Image.Image) -> bool:
    """Whether it is a TIFF file of 16-bit colours; not those multiplied by their alpha, whose bytes Pillow divides."""
    tags = getattr(image, "tag_v2", {})
    return image.mode in ("RGB", "RGBA") and set(tags.get(_BITS, ())) == {16} and tags.get(_EXTRA) != (1,)


def _is_wide_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _wide_to_rgb(image: Image.Image, source: io.BytesIO | str, levels: Levels) -> Image.Image:
    values = _wide_values(image, source)
    if values.ndim == 2:
        return _grey(values, levels)
    color = _seen(values)
    narrow = to_bytes(color, levels if "integer" in levels else _own_levels(color))
    if color is values:
        return Image.fromarray(narrow).convert("RGB")
    narrow = np.concatenate([narrow, (values[..., -1:] // 257).astype(np.uint8)], axis=2)
    return _on_white(Image.fromarray(narrow, "LA" if narrow.shape[2] == 2 else "RGBA"))


def _seen(values: NDArray[Any]) -> NDArray[Any]:
    """Values without those of transparency, which say nothing about the levels."""
    return values[..., :-1] if values.ndim == 3 and values.shape[2] in (2, 4) else values


def _wide_values(image: Image.Image, source: io.BytesIO | str) -> NDArray[Any]:
    """All bits of an image, of shape `(height, width)` or `(height, width, channels)`, turned upright.

    Pillow keeps the upper byte of 16-bit colours only; torchvision decodes both of PNG files.
    """
    if _is_wide_grey(image):
        return np.asarray(_upright(image))
    if _is_wide_tiff(image):
        with Image.open(source, formats=["TIFF"]) as again:
            upper, lower = _tiff_bytes(image, upper=True), _tiff_bytes(again, upper=False)
        return upper.astype(np.uint16) << 8 | lower
    from torchvision.io import ImageReadMode, decode_image  # type: ignore[import-untyped]

    content = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
    pixels = decode_image(
        torch.frombuffer(bytearray(content), dtype=torch.uint8),
        mode=ImageReadMode.UNCHANGED,
        apply_exif_orientation=True,
    )
    wide: NDArray[Any] = pixels.permute(1, 2, 0).numpy()
    return wide[..., 0] if wide.shape[2] == 1 else wide


def _tiff_bytes(image: Any, *, upper: bool) -> NDArray[np.uint8]:
    """One byte of each 16-bit colour; the lower is what Pillow takes for the upper if told the other byte order."""
    order = "L" if image.tag_v2.prefix == b"II" else "B"
    tiles = []
    for tile in image.tile:
        codec, extents, offset, (layout, *rest) = tile
        if codec == "libtiff" and image.tag_v2.get(_PLANAR) == 2:  # libtiff does not ask for the order there
            raise ValueError("Pillow cannot decode 16-bit colours compressed plane by plane: save them interleaved")
        full = layout if ";16" in layout else f"{layout};16{order}"  # of a plane Pillow forgets that it has 16 bits
        asked = full if upper else full[:-1] + _OTHER_ORDER[full[-1]]
        tiles.append(getattr(tile, "_make", tuple)((codec, extents, offset, (asked, *rest))))
    image.tile = tiles
    return np.asarray(_upright(image))


def _grey(values: NDArray[Any], levels: Levels) -> Image.Image:
    known = levels if kind_of(values) in levels else _own_levels(values)
    return Image.fromarray(to_bytes(values, known)).convert("RGB")


def _own_levels(values: NDArray[Any]) -> Levels:
    return levels_of([(kind_of(values), extremes(values) or (0.0, 1.0))])


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _converted(image: Image.Image | None) -> Image.Image:
    assert image is not None  # ImageCms returns None only when it converts in place
    return image
