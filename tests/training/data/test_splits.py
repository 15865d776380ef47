import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from bnfinetune.recipe import Data
from bnfinetune.training.data import ImageSplits, load_splits
from bnfinetune.training.data.images import open_image
from tests.training.data.conftest import picture, table, write_folder, write_tar

TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")


def load(source, seed: int = 1, **options) -> ImageSplits:
    return load_splits(Data(source=str(source), **options), seed)


def counts(split: datasets.Dataset, splits: ImageSplits) -> list[int]:
    return np.bincount(split[:][splits.label_column], minlength=len(splits.class_names)).tolist()


def first_image(split: datasets.Dataset, splits: ImageSplits) -> np.ndarray:
    return np.asarray(open_image(split[0][splits.image_column], "", 10**6))


def test_class_folders_are_divided_by_class_and_seed(tmp_path):
    root = write_folder(tmp_path / "pets", {"cat": 10, "ant": 20, "bee": 5})
    splits = load(root)
    assert splits.class_names == ("ant", "bee", "cat")
    assert counts(splits.train, splits) == [16, 4, 8]
    assert counts(splits.val, splits) == [4, 1, 2]
    assert splits.test is None
    assert splits.describe() == f"{root}: 28 train, 7 validation images; 3 classes"
    paths = [row["image"]["path"] for part in (splits.train, splits.val) for row in part]
    assert sorted(paths) == sorted(str(path) for path in root.rglob("*.png"))
    assert load(root).fingerprint() == splits.fingerprint()
    assert load(root, seed=2).val["image"] != splits.val["image"]
    assert all(splits.class_names[row["label"]] == Path(row["image"]["path"]).parent.name for row in splits.train)


@pytest.mark.parametrize("val", ["val", "validation", "valid", "dev"])
def test_split_folders_by_their_usual_names(tmp_path, val):
    root = write_folder(tmp_path, {"train/a": 3, "train/b": 4, f"{val}/a": 1, f"{val}/b": 2, "test/a": 2, "notes/x": 1})
    splits = load(root)
    assert [counts(part, splits) for part in (splits.train, splits.val, splits.test)] == [[3, 4], [1, 2], [2, 0]]
    assert splits.names == {"train": "train", "val": val, "test": "test"}


def test_test_split_alone_stays_the_test_split(tmp_path):
    splits = load(write_folder(tmp_path, {"train/a": 10, "train/b": 10, "test/a": 3, "test/b": 3}))
    assert [counts(part, splits) for part in (splits.train, splits.val, splits.test)] == [[8, 8], [2, 2], [3, 3]]


def test_splits_by_names_of_the_recipe(tmp_path):
    names = {"fit/a": 3, "fit/b": 3, "tune/a": 2, "tune/b": 2, "val/a": 1, "val/b": 1}
    splits = load(write_folder(tmp_path, names), train_split="fit", val_split="tune", test_split="val")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [6, 4, 2]


def test_names_of_classes_stay_text(tmp_path):
    names = ["été", "a b", "x..", "$(rm)", "<b>", "train"]
    splits = load(write_folder(tmp_path, dict.fromkeys(names, 5)))
    assert splits.class_names == tuple(sorted(name for name in names))


def test_deep_hidden_linked_and_other_files(tmp_path):
    root = write_folder(tmp_path / "pets", {"a": 2, "b": 2})
    picture(1).save(_made(root / "a" / "more" / "deep.JPEG"))
    picture(1).save(_made(root / "a" / ".hidden.png"))
    picture(1).save(_made(root / ".cache" / "x.png"))
    (root / "b" / "notes.txt").write_text("no image")
    (root / "b" / "loop").symlink_to(root / "b")
    (tmp_path / "elsewhere").mkdir()
    picture(2).save(tmp_path / "elsewhere" / "far.png")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    splits = load(root, val_fraction=0.4)
    assert splits.class_names == ("a", "b", "c")
    assert len(splits.train) + len(splits.val) == 6


def _made(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path


def test_train_samples_are_stratified_and_leave_validation_alone(tmp_path):
    root = write_folder(tmp_path, {"a": 10, "b": 20, "c": 30})
    splits = load(root, train_samples=12)
    assert counts(splits.train, splits) == [2, 4, 6]
    assert splits.val["image"] == load(root).val["image"]
    assert len(load(root, train_samples=500).train) == 48


def test_parquet_file_with_class_labels(tmp_path):
    feature = datasets.ClassLabel(names=["zebra", "ant"])
    table(20, [0, 1] * 10, feature).to_parquet(tmp_path / "all.parquet")
    splits = load(tmp_path / "all.parquet")
    assert (splits.image_column, splits.label_column) == ("picture", "kind")
    assert splits.class_names == ("zebra", "ant")
    assert counts(splits.val, splits) == [2, 2]
    row = next(row for row in splits.train if row["kind"] == 0)
    assert row["picture"]["bytes"]


def test_parquet_pattern_takes_splits_from_file_names(tmp_path):
    for name, size in {"train-00000-of-2": 6, "train-00001-of-2": 4, "pets_validation": 4, "test": 2}.items():
        table(size, ["a", "b"] * (size // 2), TEXT, size).to_parquet(tmp_path / f"{name}.parquet")
    splits = load(tmp_path / "*.parquet")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [10, 4, 2]
    assert np.array_equal(first_image(splits.test, splits), np.asarray(picture(2)))
    in_folder = load(tmp_path)
    assert len(in_folder.train) == 10


def test_webdataset_shards_by_braces(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"part-{shard:03}.tar", [(f"{shard}{row}", row % 2) for row in range(5)], 10 * shard)
    splits = load(tmp_path / "part-{000..001}.tar")
    assert (splits.image_column, splits.label_column) == ("png", "cls")
    assert splits.class_names == ("0", "1")
    assert len(splits.train) + len(splits.val) == 10


def test_save_to_disk_folder(tmp_path):
    parts = {"train": table(10, ["a", "b"] * 5, TEXT), "validation": table(4, ["a", "b"] * 2, TEXT, 50)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    parts["train"].save_to_disk(tmp_path / "one")
    assert [len(part) for part in (load(tmp_path / "all").train, load(tmp_path / "all").val)] == [10, 4]
    assert [len(part) for part in (load(tmp_path / "one").train, load(tmp_path / "one").val)] == [8, 2]


def test_imagefolder_with_a_metadata_file(tmp_path):
    for number in range(10):
        picture(number).save(_made(tmp_path / "train" / f"{number}.png"))
    lines = ["file_name,label", *(f"{number}.png,{'odd' if number % 2 else 'even'}" for number in range(10))]
    (tmp_path / "train" / "metadata.csv").write_text("\n".join(lines))
    splits = load(tmp_path)
    assert splits.class_names == ("even", "odd")
    assert len(splits.train) == 8


@pytest.mark.parametrize(
    ("labels", "feature", "names", "numbers"),
    [
        (["b", "a", "c", "a"], TEXT, ("a", "b", "c"), [1, 0, 2, 0]),
        ([0, 2, 1, 2], NUMBER, ("0", "1", "2"), [0, 2, 1, 2]),
        ([10, 9, 9, 100], NUMBER, ("9", "10", "100"), [1, 0, 0, 2]),
        ([True, False, True, True], datasets.Value("bool"), ("False", "True"), [1, 0, 1, 1]),
    ],
)
def test_labels_become_class_numbers(tmp_path, labels, feature, names, numbers):
    for split in ("train", "val"):
        table(4, labels, feature).to_parquet(tmp_path / f"{split}.parquet")
    splits = load(tmp_path / "*.parquet")
    assert splits.class_names == names
    assert list(splits.train["kind"]) == list(splits.val["kind"]) == numbers
    assert splits.train.features["kind"] == datasets.ClassLabel(names=list(names))


def test_splits_with_class_names_in_another_order_agree_by_name(tmp_path):
    table(4, [0, 1, 0, 1], datasets.ClassLabel(names=["a", "b"])).to_parquet(tmp_path / "train.parquet")
    table(3, [0, 0, 1], datasets.ClassLabel(names=["b", "a"])).to_parquet(tmp_path / "val.parquet")
    splits = load(tmp_path / "*.parquet")
    assert list(splits.val["kind"]) == [1, 1, 0]


def test_declared_classes_name_numbers(tmp_path):
    table(10, [0, 1] * 5, NUMBER).to_parquet(tmp_path / "all.parquet")
    assert load(tmp_path / "all.parquet", classes=("no", "yes")).class_names == ("no", "yes")


def test_test_split_without_labels_is_left_out_unless_asked_for(tmp_path):
    feature = datasets.ClassLabel(names=["a", "b"])
    table(10, [0, 1] * 5, feature).to_parquet(tmp_path / "train.parquet")
    table(3, [-1, -1, -1], feature).to_parquet(tmp_path / "test.parquet")
    assert load(tmp_path / "*.parquet").test is None


def test_bytes_without_an_image_type_and_other_columns(tmp_path):
    rows = table(10, ["a", "b"] * 5, TEXT).cast_column("picture", datasets.Image(decode=False))
    plain = {
        "scan": [row["bytes"] for row in rows["picture"]],
        "id": list(range(10)),
        "label": rows["kind"],
        "kind": rows["kind"],
    }
    datasets.Dataset.from_dict(plain).to_parquet(tmp_path / "all.parquet")
    splits = load(tmp_path / "all.parquet")
    assert (splits.image_column, splits.label_column) == ("scan", "label")
    assert splits.train.column_names == ["scan", "label"]
    assert load(tmp_path / "all.parquet", label_column="kind").label_column == "kind"
    assert np.array_equal(first_image(splits.train, splits), np.asarray(picture(splits_first_row(splits))))


def splits_first_row(splits: ImageSplits) -> int:
    return int(splits.train._indices.column(0)[0].as_py())


def test_unreadable_images_are_left_out_before_training(tmp_path):
    root = write_folder(tmp_path, {"a": 6, "b": 6})
    (root / "b" / "004.png").write_bytes(b"")
    splits = load(root, on_error="skip", val_fraction=0.3)
    assert len(splits.train) + len(splits.val) == 11
    assert len(splits.skipped) == 1
    assert "b/004.png" in splits.skipped[0]
    assert "1 unreadable left out" in splits.describe()


def test_fingerprint_tells_contents_not_places(tmp_path):
    root = write_folder(tmp_path / "here", {"a": 5, "b": 5})
    expected = load(root).fingerprint()
    shutil.copytree(root, tmp_path / "there")
    assert load(tmp_path / "there").fingerprint() == expected
    picture(99).save(root / "a" / "000.png")
    changed = load(root).fingerprint()
    (root / "a" / "004.png").rename(root / "a" / "renamed.png")  # still the last
    renamed = load(root).fingerprint()
    (root / "b").rename(root / "c")
    assert len({expected, changed, renamed, load(root).fingerprint()}) == 4


def test_fingerprint_tells_labels(tmp_path):
    for name, labels in {"some": ["a", "b"] * 5, "others": ["b", "a"] * 5}.items():
        for split in ("train", "val"):
            table(10, labels, TEXT).to_parquet(_made(tmp_path / name / f"{split}.parquet"))
    assert load(tmp_path / "some").fingerprint() != load(tmp_path / "others").fingerprint()


def test_fingerprint_tells_choices_of_images():
    fewer = load("demo", train_samples=100)
    prints = {load("demo").fingerprint(), fewer.fingerprint(), load("demo", train_samples=100, seed=2).fingerprint()}
    assert len(prints) == 3
    assert fewer.fingerprint() in prints


def test_demo_has_its_own_splits():
    splits = load("demo")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [200, 397, 1200]
    assert splits.class_names == tuple("0123456789")


@pytest.mark.parametrize("name", ["set [1]", "x (2) #3", "a*b?", "{1,2}"])
def test_brackets_in_the_names_of_parquet_files_and_folders(tmp_path, name):
    rows = table(10, ["a", "b"] * 5, TEXT)
    rows.to_parquet(tmp_path / "plain.parquet")
    shutil.copy(tmp_path / "plain.parquet", tmp_path / f"{name}.parquet")
    (tmp_path / name).mkdir()
    shutil.copy(tmp_path / "plain.parquet", tmp_path / name / "train.parquet")
    rows.save_to_disk(tmp_path / f"{name} on disk")
    for source in (f"{name}.parquet", name, f"{name}/*.parquet", f"{name} on disk"):
        splits = load(tmp_path / source)
        assert (len(splits.train) + len(splits.val), splits.class_names) == (10, ("a", "b"))
