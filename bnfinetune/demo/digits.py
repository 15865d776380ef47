"""Real handwriting: the 1,797 digits of scikit-learn, as a small target set."""

from __future__ import annotations

from typing import Final

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from numpy.typing import NDArray
from PIL import Image as PILImage
from sklearn.datasets import load_digits as load_sklearn_digits
from sklearn.model_selection import train_test_split

from bnfinetune.demo.alphabet import CLASSES, IMAGE_SIZE

SPLIT_SIZES: Final = {"train": 200, "validation": 397, "test": 1200}
"""Images per split: few labels to learn from, many to measure on."""

_SPLIT_SEED = 0
_FULL_INK = 16  # largest value in scikit-learn's images


def load_digits() -> DatasetDict:
    """Load the handwritten digits as dark ink on light paper, enlarged bicubically from 8x8 to 32x32.

    The splits are stratified by class, disjoint and always the same. Everything stays in memory.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.

    Returns:
        The splits of `SPLIT_SIZES`, each with the columns `image` (greyscale, 32x32) and `label` (a `ClassLabel` over
        "0" to "9").
    """
    source = load_sklearn_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    splits = DatasetDict()
    for name, rows in _split(source.target).items():
        columns = {"image": [_enlarge(source.images[row]) for row in rows], "label": source.target[rows].tolist()}
        splits[name] = Dataset.from_dict(columns, features=features, split=name)
    return splits


def load_domains(printed: int = 1_000) -> DatasetDict:
    """Load the handwritten digits with printed ones beside them: two domains of the same ten classes.

    Args:
        printed: Printed digits in the training split; the other splits are handwriting only.

    Returns:
        The splits of `load_digits`, with a third column `domain` ("printed" or "handwritten").
    """
    from bnfinetune.demo.characters import render

    splits = load_digits()
    rows = [len(CLASSES) * (number // 10) + number % 10 for number in range(printed)]  # the digits come first of all
    columns = {
        "image": [*splits["train"]["image"], *(PILImage.fromarray(render(row)) for row in rows)],
        "label": [*splits["train"]["label"], *(row % len(CLASSES) for row in rows)],
        "domain": ["handwritten"] * len(splits["train"]) + ["printed"] * printed,
    }
    features = Features({**splits["train"].features, "domain": Value("string")})
    splits["train"] = Dataset.from_dict(columns, features=features, split="train")
    for name in ("validation", "test"):
        splits[name] = splits[name].add_column("domain", ["handwritten"] * len(splits[name]))
    return splits


def _split(labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Divide the rows among the splits, keeping the share of each class."""
    rows = np.arange(len(labels))
    parts = {}
    for name in ("train", "validation"):
        chosen, rows = train_test_split(
            rows, train_size=SPLIT_SIZES[name], stratify=labels[rows], random_state=_SPLIT_SEED
        )
        parts[name] = chosen
    return parts | {"test": rows}


def _enlarge(ink: NDArray[np.float64]) -> PILImage.Image:
    """Turn an 8x8 map of ink (0 to 16) into an enlarged greyscale image."""
    paper = np.rint(255 * (1 - ink / _FULL_INK)).astype(np.uint8)
    return PILImage.fromarray(paper).resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.BICUBIC)
