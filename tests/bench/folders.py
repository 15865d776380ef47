"""Image folders that benches write themselves: JPEG files of a camera's kind, in classes that a network can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter


def write_jpegs(folder: Path, *, classes: int = 4, train: int = 100, val: int = 25, size: int = 320) -> Path:
    """Writes `train` and `val` photos of each class: smooth noise, in colours and of a grain that tell the class."""
    rng = np.random.default_rng(0)
    hues = rng.uniform(60, 190, (classes, 3))
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            target = folder / split / f"class{label}"
            target.mkdir(parents=True)
            for number in range(count):
                noise = rng.normal(0, 60, (size * 3 // 4, size, 3)) + hues[label] + rng.normal(0, 25, 3)
                image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
                image.filter(ImageFilter.GaussianBlur(1 + label)).save(target / f"{number}.jpg", quality=90)
    return folder
