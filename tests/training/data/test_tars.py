"""Webdataset shards as people have them."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.training.data import load_splits
from tests.training.data.conftest import picture, png, write_folder


def write(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """A shard of samples, members by what follows the key; a key of its own for each."""
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for field, content in sample.items():
                member = tarfile.TarInfo(field if "/" in field else f"{number:04}.{field}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def load(source, **options):
    return load_splits(Data(source=str(source), **options), 1)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def both_ways(path: Path, classes: tuple[str, ...], **options) -> None:
    """A set read as a whole and as a stream has the same classes and images."""
    splits = load(path, **options)
    assert splits.class_names == classes
    rows = [*splits.train, *splits.val]
    assert all(row[splits.image_column]["bytes"] for row in rows)
    for word in ("train", "val"):
        path.with_name(f"{word}.tar").write_bytes(path.read_bytes())
    stream = load(
        path.parent / "{train,val}.tar".replace("{train,val}", "[tv]*"), streaming=True, classes=classes, **options
    )
    labels = [row[stream.label_column] for row in stream.train]
    assert len(labels) == len(rows)
    assert sorted(labels) == sorted(row[splits.label_column] for row in rows)


def test_names_as_classes(tmp_path):
    both_ways(write(tmp_path / "a.tar", [{"png": png(n), "cls": ["cat", "None"][n % 2].encode()} for n in range(10)]),
              ("None", "cat"))  # fmt: skip


def test_numbers_as_classes(tmp_path):
    samples = [{"JPG": jpeg(n), "cls": str([2, 10][n % 2]).encode() + b"\n"} for n in range(10)]
    assert load(write(tmp_path / "a.tar", samples)).class_names == ("2", "10")


def test_numbers_and_names_are_names(tmp_path):
    samples = [{"png": png(n), "cls": ["1", "two", "007"][n % 3].encode()} for n in range(12)]
    assert load(write(tmp_path / "a.tar", samples)).class_names == ("007", "1", "two")


@pytest.mark.parametrize("label", ["label", "class_name", "Category"])
def test_json_labels(tmp_path, label):
    samples = [
        {"jpg": jpeg(n), "json": json.dumps({label: ["x", "y"][n % 2], "width": n, "tags": ["a"]}).encode()}
        for n in range(10)
    ]
    both_ways(write(tmp_path / "a.tar", samples), ("x", "y"))


def test_another_json_value_by_name(tmp_path):
    samples = [{"jpg": jpeg(n), "json": json.dumps({"site": n % 2, "day": n}).encode()} for n in range(10)]
    with pytest.raises(DataError, match="data.label_column of .* is not told by the columns"):
        load(write(tmp_path / "a.tar", samples))
    assert load(tmp_path / "a.tar", label_column="site").class_names == ("0", "1")


def test_images_of_several_formats_are_one_column(tmp_path):
    samples = [
        {["png", "jpg", "jpeg"][n % 3]: [png, jpeg, jpeg][n % 3](n), "cls": b"ab"[n % 2 : n % 2 + 1]} for n in range(12)
    ]
    splits = load(write(tmp_path / "a.tar", samples))
    assert splits.image_column == "image"
    assert len(splits.train) + len(splits.val) == 12


def test_several_images_in_a_sample_have_to_be_told_apart(tmp_path):
    samples = [{"photo.jpg": jpeg(n), "mask.png": png(n), "cls": b"ab"[n % 2 : n % 2 + 1]} for n in range(10)]
    write(tmp_path / "a.tar", samples)
    with pytest.raises(DataError, match=r"data.image_column of .* could mean 'mask.png', 'photo.jpg': name it"):
        load(tmp_path / "a.tar")
    splits = load(tmp_path / "a.tar", image_column="photo.jpg")
    assert splits.train[0]["photo.jpg"]["bytes"][:2] == b"\xff\xd8"


def test_hidden_members_and_others_are_no_samples(tmp_path):
    samples = [
        {
            "png": png(n),
            "cls": b"ab"[n % 2 : n % 2 + 1],
            "npy": b"x",
            f"__MACOSX/{n:04}.png": b"x",
            f"x/._{n:04}.png": b"x",
        }
        for n in range(10)
    ]
    splits = load(write(tmp_path / "a.tar", samples))
    assert len(splits.train) + len(splits.val) == 10


def test_a_shard_that_changes_is_read_anew(tmp_path):
    for labels in ("ab", "xyz"):
        write(tmp_path / "a.tar", [{"png": png(n), "cls": labels[n % len(labels)].encode()} for n in range(12)])
        assert load(tmp_path / "a.tar").class_names == tuple(labels)


@pytest.mark.parametrize("name", ["set [1].tar", "x (2) #3.tar", "ü{1}.tar"])
def test_any_file_name_will_do(tmp_path, name):
    write(tmp_path / name, [{"png": png(n), "cls": b"ab"[n % 2 : n % 2 + 1]} for n in range(10)])
    assert load(tmp_path / name).class_names == ("a", "b")
    (tmp_path / "[folder]").mkdir()
    for shard in (0, 1):
        (tmp_path / "[folder]" / f"part-{shard:03}.tar").write_bytes((tmp_path / name).read_bytes())
    splits = load(tmp_path / "[folder]" / "part-{000..001}.tar")
    assert len(splits.train) + len(splits.val) == 20


@pytest.mark.parametrize("name", ["my_test_images.tar", "train-station-photos.tar", "latest.tar"])
def test_words_in_the_name_of_the_only_file_do_not_split_it(tmp_path, name):
    write(tmp_path / name, [{"png": png(n), "cls": b"ab"[n % 2 : n % 2 + 1]} for n in range(10)])
    splits = load(tmp_path / name)
    assert len(splits.train) + len(splits.val) == 10


def test_hidden_files_beside_shards(tmp_path):
    write(tmp_path / "a.tar", [{"png": png(n), "cls": b"ab"[n % 2 : n % 2 + 1]} for n in range(10)])
    (tmp_path / "._a.tar").write_bytes(b"Mac OS X")
    assert load(tmp_path).class_names == ("a", "b")


def test_a_folder_of_nothing_that_can_be_read_says_what_is_there(tmp_path):
    write_folder(tmp_path, {"a": 0})
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"nor parquet, webdataset or save_to_disk data \(found: 1 .zip\)"):
        load(tmp_path)
