import pytest

from bnfinetune.recipe import Data
from bnfinetune.training.data import readable
from bnfinetune.training.data.readable import unreadable_images
from bnfinetune.training.data.sources import open_source
from tests.training.data.conftest import png, write_folder


@pytest.fixture
def split(tmp_path):
    root = write_folder(tmp_path, {"a": 10, "b": 10})
    (root / "a" / "000.png").write_bytes(b"no image")
    (root / "b" / "003.png").write_bytes(png(1)[:200])  # its first bytes are sound
    return open_source(Data(source=str(root)))["train"]


def rows(split) -> list[int]:
    return sorted(unreadable_images(split, "image", "x", 10_000))


def test_small_split_is_decoded_as_a_whole(split):
    assert rows(split) == [0, 13]


@pytest.mark.parametrize("limit", ["_SMALL_BYTES", "_SMALL_IMAGES"])
def test_large_split_is_checked_by_headers(split, limit, monkeypatch):
    monkeypatch.setattr(readable, limit, 10)
    assert rows(split) == [0]


def test_number_of_headers_is_bounded(split, monkeypatch):
    monkeypatch.setattr(readable, "_SMALL_IMAGES", 10)
    monkeypatch.setattr(readable, "_HEADERS", 5)
    opened = []
    monkeypatch.setattr(readable, "check_header", lambda raw, *_: opened.append(raw["path"]))
    assert rows(split) == []
    assert len(set(opened)) == 5
