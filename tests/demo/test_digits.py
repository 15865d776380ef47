"""The handwritten digits: every image once, the splits as promised, the ink the right way round."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits as load_sklearn_digits

from bnfinetune.demo import load_digits
from bnfinetune.demo.digits import SPLIT_SIZES


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def pixels(split):
    return np.stack([np.asarray(image, dtype=float) for image in split["image"]])


def test_splits_have_the_promised_sizes(digits):
    assert (
        {name: len(split) for name, split in digits.items()}
        == SPLIT_SIZES
        == {
            "train": 200,
            "validation": 397,
            "test": 1200,
        }
    )


def test_the_splits_together_hold_every_image_once_with_its_label(digits):
    """Averaging undoes the enlargement nearly; the best one-to-one match with the originals is then near and true."""
    source = load_sklearn_digits()
    small = np.concatenate([pixels(digits[name]) for name in digits]).reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
    labels = np.concatenate([digits[name]["label"] for name in digits])
    ink = (255 - small.reshape(-1, 64)) / 255 * 16
    distance = cdist(ink, source.data)
    rows, match = linear_sum_assignment(distance)
    assert distance[rows, match].max() < np.median(distance) / 2
    assert np.array_equal(labels, source.target[match])


def test_splits_are_stratified(digits):
    share = np.bincount(load_sklearn_digits().target) / 1797
    for name, split in digits.items():
        counts = np.bincount(split["label"], minlength=10)
        assert np.abs(counts - share * SPLIT_SIZES[name]).max() < 1.5, name


def test_the_splits_are_always_the_same(digits):
    again = load_digits()
    for name, split in digits.items():
        assert np.array_equal(pixels(split), pixels(again[name]))
        assert split["label"] == again[name]["label"]


def test_ink_is_dark_on_light_paper(digits):
    images = pixels(digits["train"])
    assert images.shape[1:] == (32, 32)
    assert images[:, :, 0].mean() > 240  # the left margin is paper
    assert images[:, 12:20, 12:20].mean() < 160
    assert digits["train"].features["label"].names == [str(digit) for digit in range(10)]


def test_nothing_is_written(digits):
    assert all(not split.cache_files for split in digits.values())
