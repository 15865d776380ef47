"""Images of any number of labels, however they are written."""

import json

import datasets
import numpy as np
import pytest

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.training.data import load_splits
from bnfinetune.training.data.labels import column_numbers
from bnfinetune.training.data.loaders import build_loaders
from bnfinetune.training.data.transforms import build_transforms
from tests.training.data.conftest import DATA_CONFIG, picture, table, write_folder

SETS = [["cat"], ["dog", "cat"], [], ["dog"], ["sea"], ["sea", "dog"]] * 4
NAMES = ("cat", "dog", "sea")
TRUTH = np.array([[name in found for name in NAMES] for found in SETS], dtype=np.uint8)


def load(source, **options):
    return load_splits(Data(source=str(source), **{"task": "multilabel", **options}), 1)


def held_apart(splits):
    """The labels of all images, in the order of the pictures' numbers."""
    found = {}
    for split in (splits.train, splits.val):
        paths = [row[splits.image_column]["path"] for row in split]
        found |= {int(path.rpartition("/")[2][:-4]): labels for path, labels in zip(
            paths, column_numbers(split, splits.label_column), strict=True)}  # fmt: skip
    return np.array([found[number] for number in sorted(found)])


def listed(root, rows, kind="csv"):
    """Images `0.png`, ... and the metadata file that lists them."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(len(SETS)):
        picture(number).save(root / f"{number}.png")
    if kind == "csv":
        (root / "metadata.csv").write_text("\n".join(["file_name,tags", *rows]) + "\n")
    elif kind == "jsonl":
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        datasets.Dataset.from_list(rows).to_parquet(root / "metadata.parquet")
    return root


FORMS = {
    "bars": ("csv", lambda n, found: f"{n}.png,{'|'.join(found)}"),
    "semicolons": ("csv", lambda n, found: f"{n}.png,{'; '.join(found)}"),
    "jsonl": ("jsonl", lambda n, found: {"file_name": f"{n}.png", "tags": found}),
    "the same label twice": ("jsonl", lambda n, found: {"file_name": f"{n}.png", "tags": found * 2}),
    "parquet": ("parquet", lambda n, found: {"file_name": f"{n}.png", "tags": found}),
}


@pytest.mark.parametrize("form", FORMS)
def test_metadata_files(form, tmp_path, caplog):
    kind, row = FORMS[form]
    splits = load(listed(tmp_path, [row(n, found) for n, found in enumerate(SETS)], kind))
    assert splits.class_names == NAMES
    assert np.array_equal(held_apart(splits), TRUTH)
    assert caplog.text.count("4 of 24 images have no label and count as images of no class") == 1


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_of_0_and_1(kind, tmp_path, caplog):
    rows = [{"file_name": f"{n}.png", "width": n} | dict(zip(NAMES, hot, strict=True)) for n, hot in enumerate(TRUTH)]
    if kind == "csv":
        listed(tmp_path, [])
        lines = [",".join(map(str, values)) for values in (rows[0], *(row.values() for row in rows))]
        (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    else:
        listed(tmp_path, rows, kind)
    splits = load(tmp_path)
    assert splits.class_names == NAMES
    assert np.array_equal(held_apart(splits), TRUTH)
    assert caplog.text.count("are its 3 columns of 0 and 1: 'cat', 'dog', 'sea'") == 1
    with pytest.raises(DataError, match="name it"):
        load(tmp_path, task="multiclass")


def test_rows_of_one_image_are_its_labels(tmp_path):
    rows = [f"{n}.png,{name}" for n, found in enumerate(SETS) for name in found or [""]]
    assert np.array_equal(held_apart(load(listed(tmp_path, rows))), TRUTH)
    with pytest.raises(DataError, match=r"gives .*1.png the labels 'dog', 'cat': data.task=multilabel reads"):
        load(tmp_path, task="multiclass")


NUMBERS = [[NAMES.index(name) for name in found] for found in SETS]
EACH_OF_TWO = [[1, 0], [0, 1]] * 12
COLUMNS = {
    "names": (SETS, datasets.List(datasets.Value("string")), NAMES),
    "class labels": (NUMBERS, datasets.List(datasets.ClassLabel(names=list(NAMES))), NAMES),
    "large lists": (NUMBERS, datasets.LargeList(datasets.ClassLabel(names=list(NAMES))), NAMES),
    "numbers": (NUMBERS, datasets.List(datasets.Value("int64")), ("0", "1", "2")),
    "multi-hot": (TRUTH.tolist(), datasets.List(datasets.Value("int8"), length=3), ("0", "1", "2")),
    "flags of two": (EACH_OF_TWO, datasets.List(datasets.Value("int8")), ("0", "1")),
    "one number each": ([[0], [1]] * 12, datasets.List(datasets.Value("int64")), ("0", "1")),
    "flags": (TRUTH.astype(bool).tolist(), datasets.List(datasets.Value("bool")), ("0", "1", "2")),
    "null for none": ([found or None for found in SETS], datasets.List(datasets.Value("string")), NAMES),
    "null among class labels": (
        [found or None for found in NUMBERS],
        datasets.List(datasets.ClassLabel(names=list(NAMES))),
        NAMES,
    ),
    "text": (["|".join(found) or None for found in SETS], datasets.Value("string"), NAMES),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_columns(column, tmp_path):
    values, feature, names = COLUMNS[column]
    table(24, values, feature).to_parquet(tmp_path / "validation.parquet")
    table(24, values, feature).to_parquet(tmp_path / "train.parquet")
    splits = load(tmp_path)
    assert splits.class_names == names
    expected = TRUTH if len(names) == 3 else np.array(EACH_OF_TWO)
    assert np.array_equal(column_numbers(splits.train, splits.label_column), expected)
    assert np.array_equal(column_numbers(splits.val, splits.label_column), expected)


def test_lists_of_two_numbers_of_any_length_are_no_flags(tmp_path):
    table(6, [[0, 0], [1], [0, 1]] * 2, datasets.List(datasets.Value("int64"))).to_parquet(tmp_path / "test.parquet")
    splits = load(tmp_path, train_split="test", val_fraction=0.5)
    assert sum(column_numbers(split, "kind").sum(0) for split in (splits.train, splits.val)).tolist() == [4, 4]


def test_labels_are_written_in_one_way_in_all_splits(tmp_path):
    """A part that has the classes 0 and 1 alone, or no separator, is read as the others are."""
    feature = datasets.List(datasets.Value("int64"))
    table(6, [[0, 1], [2], [1]] * 2, feature).to_parquet(tmp_path / "train.parquet")
    table(2, [[0, 1], [1, 0]], feature).to_parquet(tmp_path / "validation.parquet")
    splits = load(tmp_path)
    assert column_numbers(splits.val, splits.label_column).tolist() == [[1, 1, 0], [1, 1, 0]]
    table(6, ["a, b|c", "c", "a, b"] * 2, datasets.Value("string")).to_parquet(tmp_path / "train.parquet")
    table(2, ["a, b", "c"], datasets.Value("string")).to_parquet(tmp_path / "validation.parquet")
    assert load(tmp_path).class_names == ("a, b", "c")


def test_names_of_numbers_are_declared(tmp_path):
    values, feature, _ = COLUMNS["multi-hot"]
    table(24, values, feature).to_parquet(tmp_path / "all.parquet")
    assert load(tmp_path, classes=NAMES).class_names == NAMES


def test_batches_have_labels_of_0_and_1_and_streams_too(tmp_path):
    values, feature, _ = COLUMNS["class labels"]
    for split in ("train", "validation"):
        table(24, values, feature).to_parquet(tmp_path / f"{split}.parquet")
    seen = []
    for streaming in (False, True):
        data = Data(source=str(tmp_path), task="multilabel", streaming=streaming, workers=0)
        splits = load_splits(data, 1)
        loaders = build_loaders(
            splits, build_transforms(data, DATA_CONFIG), data, batch_size=5, eval_batch_size=9, seed=1
        )
        seen.append(np.concatenate([labels.numpy() for _, labels, _ in loaders.val]))
        labels = next(iter(loaders.train))[1]
        assert (labels.shape, str(labels.dtype)) == ((5, 3), "torch.uint8")
    assert np.array_equal(seen[0], TRUTH)
    assert np.array_equal(seen[1], TRUTH)


def test_class_folders_give_one_label_each(tmp_path, caplog):
    splits = load(write_folder(tmp_path, {"a": 5, "b": 5, "a;b": 5}))
    assert splits.class_names == ("a", "b")
    assert sum(column_numbers(split, "label").sum(0) for split in (splits.train, splits.val)).tolist() == [10, 10]
    load(write_folder(tmp_path / "plain", {"a": 5, "b": 5}))
    assert caplog.text.count("no image has more than one label") == 1


def test_the_held_out_part_has_a_share_of_every_label(tmp_path):
    splits = load(listed(tmp_path, [FORMS["bars"][1](n, found) for n, found in enumerate(SETS)]), val_fraction=0.25)
    assert len(splits.val) == 6
    assert column_numbers(splits.val, "tags").sum(0).tolist() == [2, 3, 2]
    assert len(load(tmp_path, train_samples=6).train) == 6


def test_order_in_a_list_is_no_other_set(tmp_path):
    for name, sets in (("one", SETS), ("two", [found[::-1] for found in SETS])):
        table(24, sets, datasets.List(datasets.Value("string"))).to_parquet(tmp_path / f"{name}.parquet")
    one, two = (load(tmp_path / f"{name}.parquet").fingerprint() for name in ("one", "two"))
    assert one == two
    table(24, SETS[1:] + SETS[:1], datasets.List(datasets.Value("string"))).to_parquet(tmp_path / "other.parquet")
    assert load(tmp_path / "other.parquet").fingerprint() != one


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        (["a|b", "a;b"] * 3, datasets.Value("string"), r"holds both \| and ;, as in 'a\|b', 'a;b'"),
        (["a, b", "a"] * 3, datasets.Value("string"), r"is 'a, b' one label or several\? Separate"),
        (["['a']", "b"] * 3, datasets.Value("string"), r"is \"\['a'\]\" one label or several"),
        ([["a", ""], ["b"]] * 3, datasets.List(datasets.Value("string")), r"row 0 has an empty label among 'a', ''"),
        ([["a", None], ["b"]] * 3, datasets.List(datasets.Value("string")), "row 0 has an empty label"),
        ([[], None] * 3, datasets.List(datasets.Value("string")), "none of 6 images has a label"),
        ([[0.5], [1.5]] * 3, datasets.List(datasets.Value("float32")), "holds float32, not a class name or number"),
        ([[["a"]], [["b"]]] * 3, datasets.List(datasets.List(datasets.Value("string"))), "data.label_column"),
    ],
)  # fmt: skip
def test_what_is_doubtful_is_refused(values, feature, message, tmp_path):
    table(6, values, feature).to_parquet(tmp_path / "all.parquet")
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_lists_without_the_task_name_it(tmp_path, caplog):
    for column in ("names", "class labels"):
        values, feature, _ = COLUMNS[column]
        table(24, values, feature).to_parquet(tmp_path / "all.parquet")
        with pytest.raises(DataError, match="holds lists: data.task=multilabel reads any number of labels per image"):
            load(tmp_path, task="multiclass")
    table(6, ["a", "b", "a|b"] * 2, datasets.Value("string")).to_parquet(tmp_path / "all.parquet")
    assert load(tmp_path, task="multiclass").class_names == ("a", "a|b", "b")
    assert caplog.text.count("the class 'a|b' is made of others; data.task=multilabel reads it") == 1


def test_a_list_beside_a_class_is_the_label_of_its_own_task(tmp_path):
    feature = datasets.ClassLabel(names=["x", "y"])
    both = table(24, [0, 1] * 12, feature).add_column("tags", SETS)
    both.to_parquet(tmp_path / "all.parquet")
    assert load(tmp_path, task="multiclass").class_names == ("x", "y")
    assert load(tmp_path).class_names == NAMES


def test_a_stream_needs_lists(tmp_path):
    for split in ("train", "validation"):
        table(24, COLUMNS["text"][0], datasets.Value("string")).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match="holds no lists, which a stream of data.task=multilabel needs"):
        load(tmp_path, streaming=True)


def test_a_class_that_would_lose_its_training_images_is_named(tmp_path):
    rows = [FORMS["bars"][1](n, found) for n, found in enumerate(SETS)]
    with pytest.raises(DataError, match="data.val_fraction=0.99 leaves the class"):
        load(listed(tmp_path, rows), val_fraction=0.99)
    with pytest.raises(DataError, match="data.train_samples=1 leaves a class without a training image"):
        load(tmp_path, train_samples=1)
    table(10, [["x"]] * 3 + [[str(n)] for n in range(7)], datasets.List(datasets.Value("string"))).to_parquet(
        tmp_path / "rare.parquet"
    )
    with pytest.raises(DataError, match=r"data.val_fraction=0.6 leaves the class '.' \(1 images\) without a training"):
        load(tmp_path / "rare.parquet", val_fraction=0.6)
