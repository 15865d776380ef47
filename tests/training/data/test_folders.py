"""Folders as people have them: what is a split, what is a class, and what is passed over and said."""

import os
import unicodedata
from pathlib import Path

import pytest

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.training.data import load_splits
from bnfinetune.training.data.split_names import split_role, split_word
from tests.training.data.conftest import picture, write_folder

APPLE_DOUBLE = bytes((0, 5, 22, 7, 0, 2, 0, 0)) + b"Mac OS X" + bytes(60)


def load(source, **options):
    return load_splits(Data(source=str(source), **options), 1)


def sizes(splits) -> list[int | None]:
    return [None if part is None else len(part) for part in (splits.train, splits.val, splits.test)]


@pytest.fixture
def notes(caplog):
    """What was said, as one text."""
    return lambda: "\n".join(record.getMessage() for record in caplog.records if record.name == "bnfinetune")


@pytest.mark.parametrize(
    ("role", "names"),
    {
        "train": "train Train TRAIN training Training training_set trainset TrainSet train2017 train-images 01_train",
        "val": "val Valid VALID validation validation_set valid_data Dev eval val2017 ValidationSet",
        "test": "test Test TEST testing Testing test_set testset TestSet test-data test_images2",
        None: "retrain station latest contest cat_train seg_test testament intrain valley devil été trainé test_train",
    }.items(),
)
def test_names_of_splits_in_any_spelling(role, names):
    assert {name: split_role(name) for name in names.split()} == dict.fromkeys(names.split(), role)


def test_words_of_splits_among_others():
    names = {"seg_train": "train", "flowers-test-00001": "test", "x.Valid": "val", "latest": None, "train_test": None}
    assert {name: split_word(name) for name in names} == names


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Valid", "TEST"),
        ("training_set", "validation_set", "test_set"),
        ("Training", "Dev", "Testing"),
        ("train2017", "val2017", "test2017"),
    ],
)
def test_split_folders_of_any_spelling(tmp_path, train, val, test):
    names = {f"{train}/a": 3, f"{train}/b": 4, f"{val}/a": 1, f"{val}/b": 2, f"{test}/a": 2, f"{test}/b": 3}
    splits = load(write_folder(tmp_path, names))
    assert splits.class_names == ("a", "b")
    assert sizes(splits) == [7, 3, 5]
    assert splits.names == {"train": train, "val": val, "test": test}


def test_a_recipe_may_spell_a_split_otherwise(tmp_path):
    root = write_folder(tmp_path, {"Training/a": 3, "Training/b": 3, "Testing/a": 2, "Testing/b": 2})
    assert sizes(load(root, train_split="train", val_split="test")) == [6, 4, None]


def test_two_folders_for_one_role_have_to_be_told_apart(tmp_path):
    root = write_folder(tmp_path, {f"{name}/{label}": 2 for name in ("train", "val", "dev") for label in "ab"})
    with pytest.raises(DataError, match=r"data\.val_split: .* could be 'dev', 'val': name one"):
        load(root)
    assert load(root, val_split="dev").names["val"] == "dev"


def test_loose_images_of_a_test_folder_are_no_class(tmp_path, notes):
    splits = load(write_folder(tmp_path, {"cat": 5, "dog": 5, "Test": 3}))
    assert splits.class_names == ("cat", "dog")
    assert "3 in the folder 'Test', which holds no class folders" in notes()
    declared = load(tmp_path, classes=("cat", "dog", "Test"))
    assert declared.class_names == ("cat", "dog", "Test")


@pytest.mark.parametrize(("name", "key"), [("valid", "valid"), ("Training", "Training"), ("dev", "dev")])
def test_other_loose_folders_named_as_splits_have_to_be_explained(tmp_path, name, key):
    with pytest.raises(DataError, match=rf"{key} is named as a split .* say data\.classes=\["):
        load(write_folder(tmp_path, {"cat": 5, "dog": 5, name: 3}))


def test_two_classes_of_which_one_is_called_test(tmp_path):
    root = write_folder(tmp_path, {"control": 5, "test": 5})
    with pytest.raises(DataError, match=r"say data\.classes=\[control, test\]"):
        load(root)
    assert load(root, classes=("control", "test")).class_names == ("control", "test")


def test_classes_that_are_called_as_splits_are(tmp_path, notes):
    splits = load(write_folder(tmp_path, {"train": 5, "bus": 5, "car": 5}))
    assert splits.class_names == ("bus", "car", "train")
    assert "'train'" in notes()


def test_a_class_with_folders_inside_that_is_called_train(tmp_path):
    root = write_folder(tmp_path, {"train/2020": 3, "train/2021": 3, "bus/2020": 5})
    with pytest.raises(DataError, match=r"is 'train', beside 'bus' .* a class\? Say data\.train_split=train, or"):
        load(root)
    assert load(root, classes=("bus", "train")).class_names == ("bus", "train")
    assert load(root, train_split="train").class_names == ("2020", "2021")


def test_class_folders_beside_a_test_split_are_the_training_split(tmp_path):
    splits = load(write_folder(tmp_path, {"cat": 5, "dog": 5, "test/cat": 2, "test/dog": 2}))
    assert splits.class_names == ("cat", "dog")
    assert sizes(splits) == [8, 2, 4]


@pytest.mark.parametrize("names", [("seg_train", "seg_test"), ("DS_Train", "DS_Valid")])
def test_folders_that_look_like_splits_are_not_taken_for_classes(tmp_path, names):
    root = write_folder(tmp_path, {f"{name}/{label}": 2 for name in names for label in "ab"})
    with pytest.raises(DataError, match="look like splits: name them by data.train_split"):
        load(root)
    assert load(root, train_split=names[0], val_split=names[1]).class_names == ("a", "b")


def test_folders_of_the_same_folders_are_said_to_be_classes(tmp_path, notes):
    root = write_folder(tmp_path, {f"{name}/{label}": 3 for name in ("fold1", "fold2") for label in "ab"})
    assert load(root).class_names == ("fold1", "fold2")
    assert "are taken for classes; if they are splits" in notes()


def test_left_over_splits_are_named_with_their_images(tmp_path, notes):
    names = {f"{split}/{label}": 2 for split in ("train", "val") for label in "ab"} | {"notes/x": 1, "Train.old": 2}
    load(write_folder(tmp_path, names))
    assert "1 in the folder 'notes'" in notes()
    assert "2 in the folder 'Train.old'" in notes()


def test_everything_passed_over_is_counted_and_named_once(tmp_path, notes):
    root = write_folder(tmp_path / "pets", {"a": 5, "b": 5})
    for name in ("a/._000.png", "b/.hidden.jpg", "@eaDir/x.png", "a/notes.txt", "b/raw.cr2", "loose.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(APPLE_DOUBLE)
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    splits = load(root)
    assert len(splits.train) + len(splits.val) == 10
    said = notes()
    for part in ("3 hidden", "1 links to nothing", "1 .txt", "1 .cr2", "1 images that lie in no class folder"):
        assert said.count(part) == 1, said


def test_links_to_folders_and_files_are_followed(tmp_path):
    store = write_folder(tmp_path / "store", {"x": 3, "y": 3})
    root = tmp_path / "set"
    (root / "b").mkdir(parents=True)
    (root / "a").symlink_to(store / "x")
    for file in (store / "y").iterdir():
        (root / "b" / file.name).symlink_to(file)
    (root / "b" / "again").symlink_to(root)
    assert sizes(load(root, val_fraction=0.34)) == [4, 2, None]


def test_numbers_and_words_of_nothing_are_class_names(tmp_path):
    names = ["1", "2", "10", "None", "NA", "nan", "null", "true", "1e3"]
    splits = load(write_folder(tmp_path, dict.fromkeys(names, 5)))
    assert splits.class_names == tuple(sorted(names))
    assert len(splits.train) + len(splits.val) == 45


@pytest.mark.skipif(os.uname().sysname == "Darwin", reason="the file system composes names itself")
def test_names_that_differ_in_unicodes_spelling_only_are_one_class(tmp_path, notes):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    splits = load(write_folder(tmp_path / "one", {composed: 4, apart: 4, "tea": 4}))
    assert splits.class_names == (composed, "tea")
    assert "differ in spelling only" in notes()
    two = load(write_folder(tmp_path / "two", {f"train/{apart}": 4, "train/tea": 4, f"val/{composed}": 1}))
    assert two.class_names == (composed, "tea")
    assert two.val["label"] == [0]


def test_a_validation_split_that_lacks_a_class_says_so(tmp_path, notes):
    splits = load(write_folder(tmp_path, {"train/a": 3, "train/b": 3, "val/b": 2}))
    assert splits.val["label"] == [1, 1]
    assert "has no image of the class 'a'" in notes()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_one_image_per_class_cannot_be_divided_by_any_fraction(tmp_path, fraction):
    root = write_folder(tmp_path, {f"c{number}": 1 for number in range(6)})
    with pytest.raises(DataError, match="each of the 6 classes has one image, .* data.val_split") as caught:
        load(root, val_fraction=fraction)
    assert "raise it" not in str(caught.value)
    assert "lower it" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.2, 0.7])
def test_a_class_of_one_image_among_others_is_trained_on(tmp_path, fraction):
    splits = load(write_folder(tmp_path, {"a": 10, "b": 10, "rare": 1}), val_fraction=fraction)
    assert splits.train["label"].count(2) == 1
    assert 2 not in splits.val["label"]


@pytest.mark.parametrize("counts", [{"a": 2, "b": 2}, {"a": 3, "b": 4, "c": 1}, {"a": 30, "b": 2}])
def test_the_fraction_that_a_message_proposes_works(tmp_path, counts):
    root = write_folder(tmp_path, counts)
    with pytest.raises(DataError, match=r"holds out none: raise it, to ([\d.]+), say") as caught:
        load(root, val_fraction=0.001)
    proposed = float(str(caught.value).rpartition("to ")[2].partition(",")[0])
    assert len(load(root, val_fraction=proposed).val) == 1


@pytest.mark.parametrize("name", ["set [1]", "a b", "x{1..3}", "50% off#1", "q?*", "~tilde"])
def test_any_folder_name_will_do(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / name, {"a": 5, "b [2]": 5})
    assert load(tmp_path / name).class_names == ("a", "b [2]")
    if not name.startswith("~"):
        assert load(name).class_names == ("a", "b [2]")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "pets", {"a": 5, "b": 5})
    assert Data(source="~/pets").source == str(tmp_path / "pets")
    assert load("~/pets").class_names == ("a", "b")


def test_the_same_set_elsewhere_has_the_same_fingerprint_however_it_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "a" / "set", {"x": 5, "y": 5})
    prints = {load(tmp_path / "a" / "set").fingerprint()}
    for folder, name in (("a", "set"), ("a", "./set"), (".", "a/set"), ("a/set", "../set")):
        monkeypatch.chdir(tmp_path / folder)
        prints.add(load(name).fingerprint())
    assert len(prints) == 1


def test_a_set_with_metadata_has_the_same_fingerprint_elsewhere(tmp_path, monkeypatch):
    for folder in ("one", "two/deep"):
        root = tmp_path / folder / "set"
        root.mkdir(parents=True)
        for number in range(10):
            picture(number).save(root / f"{number}.png")
        lines = ["file_name,label", *(f"{number}.png,{'ab'[number % 2]}" for number in range(10))]
        Path(root, "metadata.csv").write_text("\n".join(lines))
    absolute = load(tmp_path / "one" / "set").fingerprint()
    monkeypatch.chdir(tmp_path / "two" / "deep")
    assert load("set").fingerprint() == absolute
