"""Which values of 16-bit and float images are black and white: decided once for a whole set, never image by image.

Decided by image, a dark image would be as bright as any other, and the network could not tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["integer", "float"]
Levels = Mapping[str, tuple[float, float]]
"""Values that become 0 and 255, by kind of image: `integer` (16 or 32 bits) and `float`."""

_CUSTOMARY: Final = (1.0, 255.0, 4095.0, 65535.0)  # what white is in float images
_OVERSHOOT: Final = 0.1  # share of the range that resampling may leave it by
_FLAT: Final = 0.25  # values within so small a part of the range are spread over all of it


def kind_of(values: NDArray[Any]) -> Kind:
    """The kind of image that an array of pixels is."""
    return "float" if np.issubdtype(values.dtype, np.floating) else "integer"


def extremes(values: NDArray[Any]) -> tuple[float, float] | None:
    """The smallest and the largest finite value, or None if there is none."""
    if np.issubdtype(values.dtype, np.floating):
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else None


def levels_of(found: Iterable[tuple[Kind, tuple[float, float]]]) -> Levels:
    """The levels of a set, from the kind and the extremes of its images."""
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    for kind, (low, high) in found:
        lows[kind] = min(low, lows.get(kind, low))
        highs[kind] = max(high, highs.get(kind, high))
    return {kind: _range(kind, lows[kind], highs[kind]) for kind in lows}


def to_bytes(values: NDArray[Any], levels: Levels) -> NDArray[np.uint8]:
    """Values as bytes; what is no number, or lies below black, is 0."""
    black, white = levels[kind_of(values)]
    within = np.nan_to_num(values.astype(np.float64), nan=black).clip(black, white)
    return np.rint((within - black) / (white - black) * 255).astype(np.uint8)


def _range(kind: str, low: float, high: float) -> tuple[float, float]:
    """Black and white of values from `low` to `high`, so that they fill half of the 256 levels or more.

    White is the largest number of as many bits (`integer`) or a customary one (`float`) that `high` comes near to;
    black is 0, unless the values begin well below it, or lie close together far above it.
    """
    if kind == "integer":
        white = float((1 << max(8, int(max(high, 0)).bit_length())) - 1)
    else:
        white = next((c for c in _CUSTOMARY if c / 2 < high <= c * (1 + _OVERSHOOT * (c == 1.0))), high)
    if low < -_OVERSHOOT * abs(white) or 0 < high - low < _FLAT * abs(white):
        return low, high if high > low else low + 1
    return (0.0, white) if white > 0 else (0.0, 1.0)
