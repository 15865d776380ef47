import io
import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.training.data import images, load_splits
from bnfinetune.training.data.images import open_image, to_rgb
from tests.training.data.conftest import picture, png, write_folder

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image: Image.Image, kind: str, **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def read(raw: dict, max_pixels: int = 10_000) -> Image.Image:
    return open_image(raw, "in row 3 of split 'train'", max_pixels)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def test_plain_rgb_is_left_as_it_is():
    image = picture(1)
    assert np.array_equal(pixels(to_rgb(image)), np.asarray(image))


def test_grey_and_bilevel_fill_all_channels():
    assert np.array_equal(pixels(to_rgb(Image.fromarray(RAMP))), grey(RAMP))
    bits = Image.fromarray(RAMP > 99)
    assert bits.mode == "1"
    assert np.array_equal(pixels(to_rgb(bits)), grey(np.where(RAMP > 99, 255, 0).astype(np.uint8)))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_greys_are_scaled_not_clipped(mode):
    wide = (np.arange(256) * 257).reshape(16, 16)
    image = Image.fromarray(wide.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]))
    assert image.mode == mode
    assert np.array_equal(pixels(to_rgb(image)), grey(RAMP))


def test_16_bit_png_file_is_scaled():
    wide = Image.fromarray((RAMP.astype(np.uint16)) * 257)
    assert np.array_equal(pixels(read(saved(wide, "PNG"))), grey(RAMP))


@pytest.mark.parametrize("scale", [1 / 255, 1.0, 257.0])
def test_float_greys_of_any_range(scale):
    image = Image.fromarray((RAMP * scale).astype(np.float32))
    assert image.mode == "F"
    assert np.array_equal(pixels(to_rgb(image)), grey(RAMP))


def test_float_greys_that_are_not_finite():
    values = RAMP.astype(np.float32)
    values[0, :3] = [np.nan, np.inf, -np.inf]
    assert pixels(to_rgb(Image.fromarray(values)))[0, 2].tolist() == [0, 0, 0]


def test_palette_gives_its_colours():
    image = Image.fromarray(RAMP).convert("P")
    image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    expected = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 7)], axis=2)
    assert np.array_equal(pixels(to_rgb(image)), expected)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(kind):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((2, 1), 0)
    result = pixels(read(saved(image, kind, transparency=0)))
    assert result[1, 2].tolist() == [255, 255, 255]
    assert result[0, 0].tolist() == [0, 255, 0]


def test_alpha_is_laid_on_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 10, 20, 255), (200, 10, 20, 0), (100, 0, 50, 51)])
    blend = [round(255 * 0.8 + value * 0.2) for value in (100, 0, 50)]
    assert pixels(to_rgb(image))[0].tolist() == [[200, 10, 20], [255, 255, 255], blend]
    assert np.array_equal(pixels(to_rgb(image.convert("RGBa")))[0, :2], pixels(to_rgb(image))[0, :2])


def test_grey_with_alpha_is_laid_on_white():
    image = Image.new("LA", (2, 1))
    image.putdata([(90, 255), (90, 0)])
    assert pixels(to_rgb(image))[0, :, 0].tolist() == [90, 255]


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (2, 1))
    image.putdata([(0, 0, 0, 0), (255, 0, 0, 0)])
    assert pixels(to_rgb(image))[0].tolist() == [[255, 255, 255], [0, 255, 255]]
    from_jpeg = pixels(read(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert np.abs(from_jpeg.astype(int) - [255, 0, 0]).max() < 6


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "RGBX"])
def test_other_colour_spaces_round_trip(mode):
    flat = Image.new("RGB", (4, 4), (200, 100, 50))
    assert np.abs(pixels(to_rgb(flat.convert(mode))).astype(int) - [200, 100, 50]).max() <= 3


def test_lab_becomes_rgb():
    flat = Image.new("RGB", (4, 4), (200, 100, 50))
    lab = ImageCms.profileToProfile(
        flat, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(pixels(to_rgb(lab)).astype(int) - [200, 100, 50]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_images_upright(orientation):
    image = picture(2)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that makes the stored image of an upright one
    stored = image if orientation == 1 else image.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(read(saved(stored, "PNG", exif=exif))), np.asarray(image))


def test_broken_exif_block_is_passed_over():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer, "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12")
    assert pixels(read({"bytes": buffer.getvalue(), "path": None})).shape == (8, 8, 3)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    raw = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(read(raw))[0, 0].tolist() == [255, 0, 0]


def test_path_and_bytes_give_the_same(tmp_path):
    (tmp_path / "a.png").write_bytes(png(4))
    by_path = read({"bytes": None, "path": str(tmp_path / "a.png")})
    assert np.array_equal(pixels(by_path), pixels(read({"bytes": png(4), "path": "ignored.png"})))


def huge_png() -> bytes:
    """A few bytes that unpack to 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"bytes": b"", "path": None}, "not an image of a known format"),
        ({"bytes": b"GIF89a but no", "path": None}, "cannot read the image in row 3 of split 'train'"),
        ({"bytes": png(1)[:120], "path": None}, "cannot read the image in row 3"),
        ({"bytes": png(1)[:-200] + bytes(200), "path": None}, "cannot read the image in row 3"),
        ({"bytes": POSTSCRIPT, "path": None}, "not an image of a known format"),
        ({"bytes": huge_png(), "path": None}, "cannot read the image in row 3"),
        ({"bytes": None, "path": "/no/such.png"}, "the file is gone"),
        ({"bytes": None, "path": None}, "holds no image"),
        (None, "holds no image"),
    ],
)
def test_what_cannot_be_read_is_one_line(raw, message):
    with pytest.raises(DataError, match=message) as caught:
        read(raw)
    assert "\n" not in str(caught.value)


def test_image_above_the_pixel_limit_is_refused_with_the_key():
    assert read(saved(picture(1, (14, 12)), "PNG"), max_pixels=168).size == (14, 12)
    with pytest.raises(DataError, match=r"14 x 12 pixels, more than data.max_pixels=167"):
        read(saved(picture(1, (14, 12)), "PNG"), max_pixels=167)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA", "ICO", "PCX"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.floats(0, 1.2),
)
def test_damaged_files_give_an_image_or_one_line(kind, changes, share):
    content = bytearray(saved(picture(3, (16, 16)), kind)["bytes"])
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    result = outcome({"bytes": bytes(content[: int(share * len(content))]), "path": None})
    if isinstance(result, str):
        assert "\n" not in result
    else:
        assert result.mode == "RGB"
        assert result.width * result.height <= 10_000


def outcome(raw: dict) -> Image.Image | str:
    """The image, or why there is none."""
    try:
        return read(raw)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(
    ("shortest", "size"), [(None, (400, 304)), (305, (400, 304)), (152, (200, 152)), (40, (100, 76))]
)
def test_large_jpegs_are_decoded_smaller(shortest, size):
    ramp = np.add.outer(np.linspace(0, 150, 304), np.linspace(0, 100, 400))
    picture = Image.fromarray(np.stack([ramp, ramp[::-1], ramp / 2], axis=2).astype(np.uint8))
    raw = saved(picture, "JPEG", quality=95)
    image = open_image(raw, "in row 3", 1_000_000, shortest)
    assert image.size == size
    expected = np.asarray(picture.resize(size, Image.Resampling.BOX), dtype=np.int64)
    assert np.abs(np.asarray(image, dtype=np.int64) - expected).max() <= 6


def test_smaller_jpegs_still_turn_upright_and_others_stay_whole():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = saved(Image.new("RGB", (400, 304), "red"), "JPEG", exif=exif)
    assert open_image(turned, "in row 3", 1_000_000, 100).size == (152, 200)
    assert open_image(saved(Image.new("RGB", (400, 304)), "PNG"), "in row 3", 1_000_000, 40).size == (400, 304)
    grey_jpeg = saved(Image.new("L", (400, 304), 70), "JPEG")
    assert (pixels(open_image(grey_jpeg, "in row 3", 1_000_000, 40)) == 70).all()
    with pytest.raises(DataError, match="max_pixels"):
        open_image(turned, "in row 3", 10_000, 40)


@pytest.fixture
def without_plugins(monkeypatch):
    """As where neither HEIC nor AVIF can be decoded."""
    for kind in ("HEIF", "AVIF"):
        monkeypatch.delitem(Image.OPEN, kind, raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_avif", None)
    images._formats.cache_clear()
    images.image_endings.cache_clear()
    yield
    monkeypatch.undo()
    images._formats.cache_clear()
    images.image_endings.cache_clear()


HEADS = {"heic": b"heic", "HEIC": b"heix", "heif": b"mif1", "avif": b"avif"}


@pytest.mark.parametrize("ending", HEADS)
def test_a_format_without_decoder_is_named_with_the_remedy(ending, without_plugins):
    content = b"\0\0\0\x1cftyp" + HEADS[ending] + bytes(400)
    remedy = r"pillow>=11\.3" if ending == "avif" else "pip install pillow-heif"
    with pytest.raises(DataError, match=rf"Pillow cannot decode here: .*{remedy}"):
        read({"bytes": content, "path": None})


@pytest.mark.parametrize("ending", HEADS)
def test_files_without_decoder_are_counted_with_the_remedy(ending, without_plugins, tmp_path, caplog):
    root = write_folder(tmp_path, {"a": 5, "b": 5})
    for number in range(7):
        (root / "b" / f"IMG_{number}.{ending}").write_bytes(b"\0\0\0\x1cftyp" + HEADS[ending] + bytes(400))
    splits = load_splits(Data(source=str(root)), 1)
    assert len(splits.train) + len(splits.val) == 10
    assert f"7 .{ending.lower()} (to read these: pip install" in caplog.text
    for file in (root / "b").glob("*.png"):
        file.unlink()
    with pytest.raises(
        DataError, match=rf"the class folder .*/b holds no image that can be read, but 7 .{ending.lower()}"
    ):
        load_splits(Data(source=str(root)), 1)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_a_plugin_decodes(kind, tmp_path):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="HEIC needs the extra heif")
    assert f".{kind.lower()}" in images.image_endings()
    flat = Image.new("RGB", (32, 32), (200, 30, 40))
    found = pixels(read(saved(flat, kind), 10_000))
    assert np.abs(found.astype(int) - [200, 30, 40]).max() < 12


@pytest.mark.parametrize("size", [16, 32, 48, 64])
def test_icons_are_icons(size):
    icon = Image.new("RGBA", (size, size), (200, 30, 40, 255))  # of three channels, Pillow writes a wrong mask
    for options in ({"bitmap_format": "bmp"}, {}):
        found = pixels(read(saved(icon, "ICO", sizes=[(size, size)], **options)))
        assert found.shape == (size, size, 3)
        assert np.abs(found.astype(int) - [200, 30, 40]).max() <= 1
