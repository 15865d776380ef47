"""Images listed in a metadata file, beside class folders or alone."""

import json
from pathlib import Path

import datasets
import pytest

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.training.data import load_splits
from tests.training.data.conftest import picture, write_folder


def load(source, **options):
    return load_splits(Data(source=str(source), **options), 1)


def flat(
    root: Path, labels: list, header: str = "file_name,label", line: str = "{name},{label}", split: str = ""
) -> Path:
    """Images `0.png`, ... and a metadata file that lists them with labels."""
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    lines = [header]
    for number, label in enumerate(labels):
        picture(number).save(folder / f"{number}.png")
        lines.append(line.format(name=f"{number}.png", label=label))
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def beside_classes(root: Path, header: str, column) -> Path:
    """Class folders, and a metadata file with a further column of their images."""
    write_folder(root, {"a": 5, "b": 5, "c": 5})
    names = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    lines = [header, *(f"{name},{column(number)}" for number, name in enumerate(names))]
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("file_name,age", lambda n: 30 + n % 4),
        ("file_name,photographer", lambda n: ["Ann", "Bob"][n % 2]),
        ("patient,age", lambda n: n),
        ("file_name,is_night", lambda n: bool(n % 2)),
    ],
)
def test_another_column_beside_class_folders_is_not_the_class(tmp_path, header, column, caplog):
    splits = load(beside_classes(tmp_path, header, column))
    assert splits.class_names == ("a", "b", "c")
    assert len(splits.train) + len(splits.val) == 15
    assert caplog.text.count("metadata.csv is passed over") == 1


def test_a_column_called_label_or_named_is_the_class(tmp_path, caplog):
    beside_classes(tmp_path / "known", "file_name,Label", lambda n: ["x", "y"][n % 2])
    assert load(tmp_path / "known").class_names == ("x", "y")
    assert "classes are the column 'Label'" in caplog.text
    beside_classes(tmp_path / "named", "file_name,age", lambda n: 30 + n % 2)
    assert load(tmp_path / "named", label_column="age").class_names == ("30", "31")


def test_split_folders_of_classes_keep_them_too(tmp_path):
    for split in ("Train", "Valid"):
        beside_classes(tmp_path / split, "file_name,age", lambda n: 30 + n % 4)
    splits = load(tmp_path)
    assert splits.class_names == ("a", "b", "c")
    assert splits.names == {"train": "Train", "val": "Valid"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_words_of_nothing_are_classes_and_lose_no_image(tmp_path, kind):
    names = ["None", "NA", "nan", "null", "N/A", "true", "-1"] * 3
    flat(tmp_path, names)
    if kind != "csv":
        rows = [{"file_name": f"{number}.png", "label": name} for number, name in enumerate(names)]
        (tmp_path / "metadata.csv").unlink()
        if kind == "jsonl":
            (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        else:
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / "metadata.parquet")
    splits = load(tmp_path)
    assert splits.class_names == tuple(sorted(set(names)))
    assert len(splits.train) + len(splits.val) == 21


def test_a_file_in_each_split_folder_keeps_them_apart(tmp_path):
    """As `imagefolder` has them; the name of the first is that of the only split of a set without splits."""
    for split, count in {"train": 8, "val": 4, "test": 6}.items():
        flat(tmp_path, ["a", "b"] * (count // 2), split=split)
    splits = load(tmp_path)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [8, 4, 6]


def test_an_empty_label_is_none(tmp_path):
    with pytest.raises(DataError, match="1 of 5 images have no label, the first in row 3"):
        load(flat(tmp_path, ["a", "b", "a", "", "b"]))


def test_numbers_are_ordered_as_numbers_and_others_kept_as_written(tmp_path):
    assert load(flat(tmp_path / "numbers", [10, 9, 2] * 3)).class_names == ("2", "9", "10")
    assert load(flat(tmp_path / "codes", ["010", "9", "2"] * 3)).class_names == ("010", "2", "9")


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("file_name;label", "{name};{label}"),
        ("file_name\tlabel", "{name}\t{label}"),
        ("\ufefffile_name,label", "{name},{label}"),
        ('"file_name","label"', '"{name}","{label}"'),
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path, header, line):
    assert load(flat(tmp_path, ["é, x" if '"' in line else "é", "b"] * 5, header, line)).class_names[0] == "b"


def test_words_in_file_names_do_not_split_the_set(tmp_path):
    rows = [
        f"{label}_{word}_{number}.png,{label}" for number in range(3) for label in "ab" for word in ("test", "train")
    ]
    for row in rows:
        picture(len(row)).save(tmp_path / row.partition(",")[0])
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    splits = load(tmp_path)
    assert (len(splits.train) + len(splits.val), splits.test) == (12, None)


def test_folders_in_file_names_split_it_where_all_of_them_are_splits(tmp_path):
    write_folder(tmp_path / "all", {"Train/x": 6, "Test/x": 4})
    names = sorted(path.relative_to(tmp_path / "all") for path in (tmp_path / "all").rglob("*.png"))
    lines = [f"{str(name).replace('/', chr(92))},{'ab'[n % 2]}" for n, name in enumerate(names)]
    (tmp_path / "all" / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    splits = load(tmp_path / "all")
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (6, 4)
    write_folder(tmp_path / "some", {"test": 6, "other": 6})
    names = sorted(path.relative_to(tmp_path / "some") for path in (tmp_path / "some").rglob("*.png"))
    lines = [f"{name},{'ab'[n % 2]}" for n, name in enumerate(names)]
    (tmp_path / "some" / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert load(tmp_path / "some").test is None


def test_images_that_are_not_listed_are_counted_and_missing_ones_named(tmp_path, caplog):
    flat(tmp_path, ["a", "b"] * 5)
    for number in (20, 21):
        picture(number).save(tmp_path / f"{number}.png")
    load(tmp_path)
    assert "2 images of" in caplog.text
    (tmp_path / "3.png").unlink()
    with pytest.raises(DataError, match="cannot read the image .*3.png: the file is gone"):
        load(tmp_path)
    assert len(load(tmp_path, on_error="skip").skipped) == 1


def test_a_file_without_file_names_is_no_use_alone(tmp_path):
    with pytest.raises(DataError, match=r"metadata.csv has no column 'file_name', only 'name', 'label'"):
        load(flat(tmp_path, ["a", "b"], header="name,label"))


def test_several_columns_have_to_be_told_apart(tmp_path):
    flat(tmp_path, ["a,1", "b,2"] * 4, header="file_name,colour,size")
    with pytest.raises(DataError, match="data.label_column of .* is not told by the columns"):
        load(tmp_path)
    assert load(tmp_path, label_column="colour").class_names == ("a", "b")
