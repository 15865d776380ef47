"""The renderer: repeatable, complete, legible, and exact where it claims a distance."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from bnfinetune.demo import load_characters
from bnfinetune.demo.alphabet import AMBIGUOUS, CLASSES, IMAGE_SIZE, SAME_SHAPE
from bnfinetune.demo.characters import _distance_field, font_files, render


def pixels(split):
    return np.stack([np.asarray(image) for image in split["image"]])


def test_the_same_seed_renders_the_same_images_whatever_the_counts():
    few = load_characters(train=10, validation=5, seed=3)
    many = load_characters(train=60, validation=9, seed=3)
    assert np.array_equal(pixels(few["train"]), pixels(many["train"])[:10])
    assert np.array_equal(pixels(few["validation"]), pixels(many["validation"])[:5])


def test_an_image_depends_on_the_seed_the_split_and_the_index():
    first, other = (load_characters(train=50, validation=50, seed=seed) for seed in (0, 1))
    images = np.concatenate([pixels(each[split]) for each in (first, other) for split in ("train", "validation")])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_rendering_leaves_numpy_global_random_state_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    render(0)
    assert np.array_equal(np.random.get_state()[1], before)


def test_columns_types_and_balance():
    characters = load_characters(train=98, validation=49)
    assert {name: len(split) for name, split in characters.items()} == {"train": 98, "validation": 49}
    labels = characters["train"].features["label"]
    assert tuple(labels.names) == CLASSES
    assert np.bincount(characters["train"]["label"]).tolist() == [2] * len(CLASSES)
    image = characters["validation"][7]["image"]
    assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))


def test_classes_are_the_digits_and_every_letter_that_is_unlike_them():
    assert CLASSES[:10] == tuple("0123456789")
    assert len(set(CLASSES)) == len(CLASSES) == 62 - len(AMBIGUOUS) - len(SAME_SHAPE)
    assert not set(AMBIGUOUS) & set(CLASSES)
    assert all(letter in CLASSES and letter.lower() not in CLASSES for letter in SAME_SHAPE)


def test_both_cases_of_a_merged_letter_are_drawn(monkeypatch):
    drawn = set()

    def spy(font, char):
        drawn.add(char)
        return _distance_field(font, char)

    monkeypatch.setattr("bnfinetune.demo.characters._distance_field", spy)
    for index in range(20 * len(CLASSES)):
        if CLASSES[index % len(CLASSES)] in "PK":
            render(index)
    assert drawn == set("PpKk")


def test_every_font_draws_every_class_differently():
    fonts = font_files()
    assert len(fonts) >= 20
    for font in fonts[::4]:
        fields = np.stack([_distance_field(font, char) for char in CLASSES]).reshape(len(CLASSES), -1)
        assert len(np.unique(fields, axis=0)) == len(CLASSES), font.name
        assert (fields.max(axis=1) > 0).all(), font.name
        border = fields.reshape(-1, 64, 64)[:, [0, -1]]
        assert (border < -5).all(), f"{font.name}: a glyph reaches the edge of its field"


@pytest.mark.parametrize("char", ["8", "i", "W"])
def test_the_field_is_the_signed_distance_to_the_outline(char):
    font = next(path for path in font_files() if path.name == "DejaVuSans-Bold.ttf")
    field = _distance_field(font, char)
    outline = _outline_points(font, char)
    rng = np.random.default_rng(0)
    for row, column in rng.integers(0, 64, (100, 2)):
        nearest = np.hypot(*(outline - (row, column)).T).min()
        assert abs(field[row, column]) == pytest.approx(nearest, abs=0.75)


def _outline_points(font, char):
    """Edge pixels of the glyph drawn at eight times the field's resolution, in field pixels."""
    side, longest = 64 * 8, 40 * 8
    left, top, right, bottom = ImageFont.truetype(font, 1000).getbbox(char)
    drawn = ImageFont.truetype(font, round(1000 * longest / max(right - left, bottom - top)))
    left, top, right, bottom = drawn.getbbox(char)
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text(((side - left - right) / 2, (side - top - bottom) / 2), char, fill=255, font=drawn)
    inside = np.asarray(canvas) > 127
    edge = inside & ~(np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1))
    return (np.argwhere(edge) + 0.5) / 8 - 0.5


def test_ink_stands_out_from_its_background():
    """Half of the images are light on dark; brightness differs by far more than the noise."""
    images = np.stack([render(index) for index in range(196)]).mean(axis=3) / 255
    spread = np.percentile(images, 97, axis=(1, 2)) - np.percentile(images, 3, axis=(1, 2))
    assert spread.min() > 0.15
    light_on_dark = (np.median(images, axis=(1, 2)) < 0.5).mean()
    assert 0.3 < light_on_dark < 0.7
