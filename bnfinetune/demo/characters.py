"""Printed characters, rendered on the fly from the fonts that matplotlib ships.

Each image is one glyph, drawn from its signed distance field. The field makes distortion cheap: it is computed once per
font and character, and one bilinear look-up at warped coordinates then gives a sharp, blurred, bolder or lighter glyph
of any pose. The image of an index depends on the seed, the split and the index alone.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Final

import matplotlib
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from scipy import ndimage

from bnfinetune.demo.alphabet import CLASSES, IMAGE_SIZE, SAME_SHAPE

Array = NDArray[np.float64]

FONTS: Final = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
"""Globs of font files. Left out: symbol fonts, and cmmi10, whose old-style 0 and 1 are an o and a small-capital I."""

_FIELD_SIZE = 64  # side of a distance field, in field pixels
_GLYPH_SIZE = 40  # longest side of the glyph inside it
_SUPERSAMPLING = 2


def load_characters(train: int = 29_400, validation: int = 2_450, seed: int = 0) -> DatasetDict:
    """Render printed characters into memory.

    Classes take turns, so that any run of 49 consecutive images holds each class once. Both splits draw from the same
    fonts and distortions; they share no image.

    Args:
        train: Images in the split `train`.
        validation: Images in the split `validation`.
        seed: Seed of every random draw.

    Returns:
        The splits, each with the columns `image` (RGB, 32x32) and `label` (a `ClassLabel` over `CLASSES`).
    """
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    splits = DatasetDict()
    for stream, (name, count) in enumerate({"train": train, "validation": validation}.items()):
        columns = {
            "image": [{"bytes": _png(render(index, (seed, stream))), "path": None} for index in range(count)],
            "label": [index % len(CLASSES) for index in range(count)],
        }
        splits[name] = Dataset.from_dict(columns, features=features, split=name)
    return splits


def render(index: int, seed: tuple[int, ...] = (0,)) -> NDArray[np.uint8]:
    """Draw the image of an index; its class is `CLASSES[index % len(CLASSES)]`.

    Args:
        index: Which image.
        seed: Numbers that name the stream of images.

    Returns:
        RGB image of shape `(IMAGE_SIZE, IMAGE_SIZE, 3)`.
    """
    rng = np.random.default_rng((*seed, index))
    name = CLASSES[index % len(CLASSES)]
    char = rng.choice([name, name.lower()]) if name in SAME_SHAPE else name
    fonts = font_files()
    field = _distance_field(fonts[rng.integers(len(fonts))], str(char))
    ink = _ink(rng, field)[..., None]
    paper, pen = _colours(rng)
    image = (1 - ink) * paper + ink * pen
    image += rng.normal(0.0, rng.uniform(0.0, 0.08), image.shape)
    return np.asarray(np.clip(image, 0, 1) * 255 + 0.5, dtype=np.uint8)


@cache
def font_files() -> tuple[Path, ...]:
    """List the font files that are drawn from, in an order that no file system decides."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = sorted({path for pattern in FONTS for path in folder.glob(f"{pattern}.ttf")})
    return tuple(path for path in found if "Display" not in path.name)


@cache
def _distance_field(font: Path, char: str) -> Array:
    """Return the signed distance to the outline of a centred glyph, in field pixels, positive inside."""
    scale = _SUPERSAMPLING
    side, longest = _FIELD_SIZE * scale, _GLYPH_SIZE * scale
    probe = ImageFont.truetype(font, 100).getbbox(char)
    size = round(100 * longest / max(probe[2] - probe[0], probe[3] - probe[1]))
    drawn = ImageFont.truetype(font, size)
    left, top, right, bottom = drawn.getbbox(char)
    canvas = PILImage.new("L", (side, side))
    origin = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(origin, char, fill=255, font=drawn)
    inside = np.asarray(canvas) > 127
    distance = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    blocks = distance.reshape(_FIELD_SIZE, scale, _FIELD_SIZE, scale)
    return np.asarray(blocks.mean(axis=(1, 3)) / scale)


def _ink(rng: np.random.Generator, field: Array) -> Array:
    """Return the coverage in [0, 1] of each pixel by a posed, bent glyph of random weight and sharpness."""
    axis = np.linspace(-1, 1, IMAGE_SIZE)
    y, x = _bend(rng, *np.meshgrid(axis, axis, indexing="ij"))
    x, y = _pose(rng, x, y)
    # [-1, 1] spans the glyph's longest side
    coordinates = np.stack([y, x]) * (_GLYPH_SIZE / 2) + (_FIELD_SIZE - 1) / 2
    distance = ndimage.map_coordinates(field, coordinates, order=1, mode="nearest")
    boldness = rng.uniform(-0.4, 2.2)
    edge_width = 1.5 + 5.0 * rng.random() ** 2
    return np.asarray(np.clip((distance + boldness) / edge_width + 0.5, 0, 1))


def _pose(rng: np.random.Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Map image coordinates to glyph coordinates by a random projective transform."""
    angle, shear = rng.uniform(-0.3, 0.3, 2)
    zoom = rng.uniform(1.0, 1.7)
    stretch = np.exp(rng.uniform(-0.25, 0.25))
    linear = (
        zoom
        * np.array([[1, shear], [0, 1]])
        @ np.diag([stretch, 1 / stretch])
        @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    )
    shift = rng.uniform(-0.25, 0.25, 2)
    tilt = rng.uniform(-0.2, 0.2, 2)
    depth = 1 + tilt[0] * x + tilt[1] * y
    moved = np.tensordot(linear, np.stack([x - shift[0], y - shift[1]]), axes=1) / depth
    return moved[0], moved[1]


def _bend(rng: np.random.Generator, y: Array, x: Array) -> tuple[Array, Array]:
    """Displace coordinates by a smooth random field (elastic distortion; Simard et al., 2003)."""
    strength = rng.uniform(0.0, 0.3)
    return y + _smooth_noise(rng, 5, strength), x + _smooth_noise(rng, 5, strength)


def _colours(rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw a textured background and an ink colour that stands out from it.

    Returns:
        Background of shape `(IMAGE_SIZE, IMAGE_SIZE, 3)` and ink of shape `(3,)`, both within about [0, 1].
    """
    dark, light = rng.uniform(0.0, 0.4, 3), rng.uniform(0.6, 1.0, 3)
    grey = rng.random(2) < 0.3
    base, pen = (dark, light) if rng.random() < 0.5 else (light, dark)
    base, pen = (np.full(3, colour.mean()) if flag else colour for colour, flag in zip((base, pen), grey, strict=True))
    ramp = np.linspace(-0.5, 0.5, IMAGE_SIZE)
    slope = rng.uniform(-0.3, 0.3, (2, 3))
    gradient = ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]
    cells = int(rng.integers(3, 12))
    texture = _smooth_noise(rng, cells, rng.uniform(0.0, 0.25))[..., None]
    return base + gradient + texture * rng.uniform(0.5, 1.0, 3), pen


def _smooth_noise(rng: np.random.Generator, cells: int, strength: float) -> Array:
    """Draw Gaussian noise on a `cells` x `cells` grid and interpolate it to the image."""
    weights = _interpolation(cells)
    return np.asarray(weights @ rng.normal(0.0, strength, (cells, cells)) @ weights.T)


@cache
def _interpolation(cells: int) -> Array:
    """Return Gaussian-kernel weights of shape `(IMAGE_SIZE, cells)`; each row sums to one."""
    offset = np.linspace(0, cells - 1, IMAGE_SIZE)[:, None] - np.arange(cells)
    weights = np.exp(-0.5 * (offset / 0.6) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()  # stored uncompressed: noise does not compress, and both ways are faster
    PILImage.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
