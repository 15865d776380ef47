"""Little image sets on disk, each pixel drawn from a seed."""

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

DATA_CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Let `datasets` keep its files out of the home folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(seed: int, size: tuple[int, int] = (14, 12)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """`counts` maps `CLASS` or `SPLIT/CLASS` to a number of images."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for image in range(count):
            picture(1000 * (seed + number) + image).save(root / name / f"{image:03}.png")
    return root


def table(count: int, labels: Any, feature: Any, seed: int = 0) -> datasets.Dataset:
    """In memory, with the columns `picture` and `kind`."""
    return datasets.Dataset.from_dict(
        {"picture": [{"bytes": png(seed + row), "path": None} for row in range(count)], "kind": labels},
        features=datasets.Features({"picture": datasets.Image(), "kind": feature}),
    )


def write_tar(path: Path, rows: list[tuple[str, int]], seed: int = 0) -> None:
    """A webdataset shard of (key, class) rows."""
    with tarfile.open(path, "w") as archive:
        for number, (key, label) in enumerate(rows):
            for ending, content in {"png": png(seed + number), "cls": str(label).encode()}.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
