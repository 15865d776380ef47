"""Images of more than 8 bits keep their levels, and a dark one stays darker than a bright one."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.training.data import build_loaders, build_transforms, load_splits
from bnfinetune.training.data.images import open_image, wide_extremes
from bnfinetune.training.data.levels import levels_of
from tests.training.data.conftest import DATA_CONFIG

RAMP = np.linspace(0, 1, 4096).reshape(64, 64)


def png16(pixels: np.ndarray) -> bytes:
    """A PNG file of 16 bits and as many channels as the pixels have, without Pillow, which writes none in colour."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF")
    return buffer.getvalue()


def tiff16(pixels: np.ndarray, order: str = "<", *, planes: bool = False, compressed: bool = False) -> bytes:
    """A TIFF file of 16-bit colours, which Pillow does not write."""
    height, width, channels = pixels.shape
    parts = [pixels[..., each] for each in range(channels)] if planes else [pixels]
    strips = [part.astype(f"{order}u2").tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    begin, number = 8 + 2 + 12 * 11 + 4, len(strips)
    tables = begin + sum(map(len, strips)), begin + sum(map(len, strips)) + 4 * number
    offsets = [begin + sum(map(len, strips[:index])) for index in range(number)]
    where, long = (tables, struct.pack(f"{order}{2 * number}I", *offsets, *map(len, strips)))
    if number == 1:
        where, long = (offsets[0], len(strips[0])), b""
    bits = begin + sum(map(len, strips)) + len(long)
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, bits), (259, 3, 1, 8 if compressed else 1),
            (262, 3, 1, 2), (273, 4, number, where[0]), (277, 3, 1, channels), (278, 4, 1, height),
            (279, 4, number, where[1]), (284, 3, 1, 2 if planes else 1), (338, 3, int(channels == 4), 2)]  # fmt: skip
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count)
        + (struct.pack(f"{order}I", value) if kind == 4 or count > 1 else struct.pack(f"{order}HH", value, 0))
        for tag, kind, count, value in tags
    )
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + b"".join(strips) + long + struct.pack(f"{order}{channels}H", *[16] * channels)


def read(content: bytes, levels=None) -> np.ndarray:
    return np.asarray(open_image({"bytes": content, "path": None}, "x", 10**8, levels=levels))


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["grey TIFF", "grey PNG", "colour PNG", "with alpha"])
def test_integers_of_any_depth_keep_their_levels(bits, kind):
    values = np.rint(RAMP * (2**bits - 1)).astype(np.uint16)
    expected = np.rint(values / (2**bits - 1) * 255)
    if kind == "grey TIFF":
        found = read(tiff(values))
    else:
        channels = {"grey PNG": [values], "colour PNG": [values, values.T, values], "with alpha": [values] * 3}[kind]
        opaque = [np.full_like(values, 65535)] if kind == "with alpha" else []
        found = read(png16(np.stack([*channels, *opaque], axis=2)))
    assert np.abs(found[..., 0].astype(int) - expected).max() <= 1
    if kind == "colour PNG":
        assert np.array_equal(found[..., 1], found[..., 0].T)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("layout", [{}, {"planes": True}, {"compressed": True}])
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_tiff_files_keep_their_levels(order, layout, channels):
    values = np.rint(RAMP * 4095).astype(np.uint16)
    content = tiff16(np.stack([values, values.T, values, np.full_like(values, 65535)][:channels], 2), order, **layout)
    found = read(content)
    assert np.abs(found[..., 0] - values / 4095 * 255).max() <= 1
    assert np.array_equal(found[..., 1], found[..., 0].T)
    assert wide_extremes({"bytes": content}) == ("integer", (0, 4095))


def test_colours_that_would_lose_levels_are_refused():
    planes = tiff16(np.full((8, 8, 3), 300, np.uint16), planes=True, compressed=True)
    with pytest.raises(DataError, match=r"cannot read the image x: .* plane by plane: save them interleaved"):
        read(planes)


@pytest.mark.parametrize("top", [0.3, 1.0, 1.02, 3.0, 37.5, 100.0, 200.0, 255.0, 4095.0, 65535.0])
def test_floats_of_any_range_keep_their_levels(top):
    found = read(tiff((RAMP * top).astype(np.float32)))
    assert len(np.unique(found)) > 128
    assert found.max() >= 128


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-1000.0, 3000.0), (32000.0, 33000.0), (-0.02, 1.0)])
def test_ranges_that_do_not_begin_at_zero(low, high):
    for kind in (np.float32, np.int32) if high > 1 else (np.float32,):
        found = read(tiff((low + RAMP * (high - low)).astype(kind)))
        assert len(np.unique(found)) > 128
        assert (found[0, 0, 0], found[-1, -1, 0]) == (0, 255)


def test_what_is_no_number_is_left_aside():
    values = (RAMP * 3).astype(np.float32)
    values[0, :3] = [np.nan, np.inf, -np.inf]
    found = read(tiff(values))[0, :3, 0]
    assert found.tolist() == [0, 255, 0]


@pytest.mark.parametrize("value", [0, 1, 200, 5000])
def test_a_flat_image_is_read(value):
    assert len(np.unique(read(tiff(np.full((8, 8), value, np.uint16))))) == 1


def test_levels_of_a_set_come_from_all_its_images():
    found = levels_of([("integer", (0.0, 900.0)), ("float", (0.0, 0.4)), ("integer", (5.0, 4000.0))])
    assert found == {"integer": (0.0, 4095.0), "float": (0.0, pytest.approx(0.4))}
    assert levels_of([]) == {}


@pytest.fixture
def wide(tmp_path) -> Path:
    """Two classes of 12-bit greys in 16-bit files that brightness alone tells apart, and ordinary images."""
    for name, top in (("bright", 4095), ("dark", 1000)):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.fromarray((RAMP * top).astype(np.uint16)).save(tmp_path / name / f"{number}.tif")
    Image.new("RGB", (64, 64)).save(tmp_path / "dark" / "9.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dark_image_stays_darker_than_a_bright_one(wide, workers):
    data = Data(source=str(wide), workers=workers)
    splits = load_splits(data, 1)
    assert splits.levels == {"integer": (0.0, 4095.0)}
    transforms = build_transforms(data, DATA_CONFIG | {"mean": (0.0,) * 3, "std": (1.0,) * 3})
    loaders = build_loaders(splits, transforms, data, batch_size=4, eval_batch_size=16, seed=1)
    try:
        images, labels, _ = next(iter(loaders.val))
    finally:
        loaders.close()
    assert images[labels == 0].amax() > 0.9
    assert images[labels == 1].amax() < 0.3


def test_levels_of_the_network_are_those_of_what_it_is_measured_on(wide):
    from bnfinetune.training.data.splits import Network

    known = {"integer": (0.0, 65535.0)}
    splits = load_splits(Data(source=str(wide)), 1, network=Network(("bright", "dark"), known), whole=True)
    assert splits.levels == known
