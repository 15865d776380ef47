"""Preprocessing and augmentation: timm's transforms, with a whole batch normalised at once, where it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose  # type: ignore[import-untyped]

from bnfinetune.errors import RecipeError
from bnfinetune.recipe import Data
from bnfinetune.source_paths import DEMOS
from bnfinetune.training.data.hints import first_line

_PIL_MODES: Final = {1: "L", 3: "RGB"}


class Transform:
    """From an RGB image to the tensor that a model takes, equal bit for bit to timm's own pipeline.

    It is two steps: `draw` gives the pixels of one image (resized, cropped, augmented); `finish` gives floats, paid
    once per batch and on the device that trains, to which bytes travel in a quarter of the time.

    Args:
        geometry: PIL image to PIL image.
        channels: 1 or 3.
        mean: Mean of each channel, of values from 0 to 1.
        std: Standard deviation of each channel, of values from 0 to 1.
        erase: Erases rectangles of one finished image, in place.
        shortest: Pixels that the shorter side of an image needs; None for all that it has.
    """

    def __init__(
        self,
        geometry: Compose,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        erase: RandomErasing | None = None,
        shortest: int | None = None,
    ) -> None:
        self.geometry = geometry
        self.mode = _PIL_MODES[channels]
        self.mean, self.std = tuple(mean), tuple(std)
        self.erase = erase
        self.shortest = shortest

    def draw(self, image: Image.Image) -> NDArray[np.uint8]:
        """The pixels of one image, of shape `(height, width, channels)`."""
        if image.mode != self.mode:
            image = image.convert(self.mode)
        pixels = np.asarray(self.geometry(image))
        return pixels if pixels.ndim == 3 else pixels[..., None]

    def finish(self, pixels: Tensor) -> Tensor:
        """Normalised floats of shape `(images, channels, height, width)`, on the device of the pixels.

        They are of float32 under autocast too: it rounds them once, at the first convolution, and mixup is exact.

        Args:
            pixels: Stacked results of `draw`, bytes of shape `(images, height, width, channels)`.
        """
        mean, std = _columns(self.mean, pixels.device), _columns(self.std, pixels.device)
        batch = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return batch.div_(255).sub_(mean).div_(std)

    def __call__(self, image: Image.Image) -> Tensor:
        """The tensor of one image, of shape `(channels, height, width)`."""
        tensor = self.finish(torch.from_numpy(np.stack([self.draw(image)])))[0]
        return tensor if self.erase is None else self.erase(tensor)


@lru_cache
def _columns(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)


@dataclass(frozen=True)
class Transforms:
    """`train` augments; `eval` is deterministic."""

    train: Transform
    eval: Transform


def build_transforms(data: Data, data_config: Mapping[str, Any]) -> Transforms:
    """Build timm's transforms for a model.

    Args:
        data: The recipe's `data` section.
        data_config: timm's resolved data config of the model (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`,
            `crop_mode`). `data.image_size` has the last word on the size.

    Raises:
        RecipeError: timm does not understand `data.augment.auto_augment`, or the model takes images of neither 1 nor 3
            channels.
    """
    channels, *size = data_config["input_size"]
    if channels not in _PIL_MODES:
        raise RecipeError(f"the model takes images of {channels} channels; images have 3, or 1 (model.kwargs.in_chans)")
    if data.image_size is not None:
        size = [data.image_size, data.image_size]
    mean, std = _per_channel(data_config["mean"], channels), _per_channel(data_config["std"], channels)
    shared = {
        "input_size": (channels, *size),
        "interpolation": data_config["interpolation"],
        "mean": mean,
        "std": std,
        "normalize": False,
    }
    crop = {"crop_pct": data_config["crop_pct"], "crop_mode": data_config.get("crop_mode")}
    probability = data.augment.random_erasing
    erase = RandomErasing(probability, mode="pixel", device="cpu") if probability else None
    return Transforms(
        train=Transform(_augmentation(data, shared), channels, mean, std, erase, _shortest(data, max(size))),
        eval=Transform(_geometry(create_transform(**shared, **crop)), channels, mean, std),
    )


def flip_probability(data: Data) -> float:
    """How often a training image is mirrored: a mirrored character is another one."""
    if data.augment.hflip is not None:
        return data.augment.hflip
    return 0.0 if data.source in DEMOS else 0.5


def _augmentation(data: Data, shared: Mapping[str, Any]) -> Compose:
    augment = data.augment
    try:
        return _geometry(
            create_transform(
                **shared,
                is_training=True,
                scale=augment.scale,
                ratio=augment.ratio,
                hflip=flip_probability(data),
                vflip=augment.vflip,
                color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # timm skips None, and it alone
                auto_augment=augment.auto_augment,
            )
        )
    except (AssertionError, ValueError, KeyError) as error:  # timm asserts that it knows every part of the text
        if augment.auto_augment is None:
            raise
        raise RecipeError(
            f"data.augment.auto_augment: timm cannot read {augment.auto_augment!r} ({first_line(error)}); "
            "rand-m9-mstd0.5, augmix-m3 and original are examples"
        ) from error


def _shortest(data: Data, size: int) -> int | None:
    """The shorter side of an image whose smallest random crop has `size` pixels on its shorter side."""
    (area, _), (narrow, wide) = data.augment.scale, data.augment.ratio
    return math.ceil(size / math.sqrt(area * min(narrow, 1 / wide))) if data.fast_decode and area else None


def _geometry(transform: Compose) -> Compose:
    """timm's pipeline without its last step, which makes a tensor."""
    return Compose(transform.transforms[:-1])


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics for the model's channels; a grey image of an RGB model's config takes their average."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
