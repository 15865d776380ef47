"""Everything that can be wrong with a set: one line that names it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.training.data import load_splits
from tests.training.data.conftest import picture, png, table, write_folder, write_tar

TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")
AB, ABC = datasets.ClassLabel(names=["a", "b"]), datasets.ClassLabel(names=["a", "b", "c"])

Case = tuple[Callable[[Path], Any], dict[str, Any], str]


def folder(**counts: int) -> Callable[[Path], None]:
    return lambda root: write_folder(root, {name.replace("__", "/"): count for name, count in counts.items()}) and None


def parquet(count: int, labels: Any, feature: Any, name: str = "train") -> Callable[[Path], None]:
    return lambda root: table(count, labels, feature).to_parquet(root / f"{name}.parquet") and None


def both(*makes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda root: [make(root) for make in makes] and None


def empty_class(root: Path) -> None:
    write_folder(root, {"cat": 3, "dog": 3})
    (root / "owl").mkdir()


def file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content) and None


def spoilt(content: bytes) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        write_folder(root, {"cat": 3, "dog": 3})
        (root / "dog" / "001.png").write_bytes(content)

    return make


def loose_images(root: Path) -> None:
    for name in ("train", "val"):
        (root / name).mkdir()
        picture(1).save(root / name / "a.png")


def nested(root: Path) -> None:
    write_folder(root, {"pets/cat": 3, "pets/dog": 3})


def two_images(root: Path) -> None:
    columns = {name: [{"bytes": png(1), "path": None}] * 4 for name in ("left", "right")}
    features = datasets.Features({"left": datasets.Image(), "right": datasets.Image(), "label": AB})
    datasets.Dataset.from_dict(columns | {"label": [0, 1, 0, 1]}, features=features).to_parquet(root / "x.parquet")


def damaged_disk(root: Path) -> None:
    table(4, [0, 1, 0, 1], AB).save_to_disk(root)
    (root / "data-00000-of-00001.arrow").write_bytes(b"not arrow")


def cut_tar(root: Path) -> None:
    write_tar(root / "a.tar", [("x", 0), ("y", 1)])
    (root / "a.tar").write_bytes((root / "a.tar").read_bytes()[:700])


def other_column(root: Path) -> None:
    table(4, [0, 1] * 2, AB).rename_column("kind", "sort").to_parquet(root / "val.parquet")


FILES = {"source": "{root}/*.parquet"}
KIND = FILES | {"label_column": "kind"}
STREAM = FILES | {"streaming": True}
TRAIN, VAL, EMPTY = parquet(4, [0, 1] * 2, AB), parquet(4, [0, 1] * 2, AB, "val"), parquet(0, [], AB)

CASES: dict[str, Case] = {
    "missing folder": (folder(a=1), {"source": "{root}/petz"}, "there is no folder or file .*/petz"),
    "near folder": (folder(pets__a=2), {"source": "{root}/petz"}, "did you mean 'pets'"),
    "missing relative folder": (folder(), {"source": "./no/such"}, r"there is no folder or file \./no/such"),
    "missing parquet": (folder(), {"source": "{root}/x.parquet"}, "no file matches .*/x.parquet"),
    "empty folder": (folder(), {}, "holds no class folders with images"),
    "folder of text": (file("a.txt", b"x"), {}, "holds no class folders with images"),
    "file of another kind": (file("a.csv", b"x"), {"source": "{root}/a.csv"}, "a.csv is neither .parquet nor .tar"),
    "class without image": (empty_class, {}, "the class folder .*/owl holds no image"),
    "one class": (folder(cat=4), {}, "one class only, 'cat'"),
    "classes one level too deep": (nested, {}, "one class only, 'pets'"),
    "split folders without classes": (loose_images, {}, "'train', 'val' .* hold images but no class folders"),
    "class of validation only": (folder(train__a=2, train__b=2, val__c=2), {}, "has the class 'c' that .* lacks"),
    "unreadable image": (spoilt(b"no image"), {}, "cannot read the image .*/dog/001.png: .* known format"),
    "empty image": (spoilt(b""), {}, "cannot read the image .*/dog/001.png"),
    "truncated image": (spoilt(png(1)[:150]), {}, "cannot read the image .*/dog/001.png"),
    "large image": (folder(a=2, b=2), {"max_pixels": 100}, "a/000.png has 14 x 12 pixels.*data.max_pixels=100"),
    "no readable image": (spoilt(b""), {"max_pixels": 9, "on_error": "skip"}, "has no readable image"),
    "fraction that spends a class": (folder(a=20, b=2), {"val_fraction": 0.8}, "val_fraction=0.8 leaves the class 'b'"),
    "fraction that holds out none": (folder(a=2, b=2), {"val_fraction": 0.1}, "val_fraction=0.1 of 4 images holds"),
    "too few samples": (folder(a=5, b=5), {"train_samples": 1}, "train_samples=1 leaves a class without"),
    "unknown train split": (folder(train__a=2, train__b=2), {"train_split": "trian"}, "did you mean 'train'"),
    "unknown val split": (folder(train__a=2, train__b=2), {"val_split": "dev"}, "data.val_split: .* only 'train'"),
    "unknown test split": (folder(train__a=2, train__b=2), {"test_split": "x"}, "data.test_split: .* no split 'x'"),
    "split used twice": (folder(train__a=2, train__b=2), {"val_split": "train"}, "one split cannot serve twice"),
    "unknown image column": (parquet(4, [0, 1] * 2, AB), {**FILES, "image_column": "pictur"}, "mean 'picture'"),
    "unknown label column": (parquet(4, [0, 1] * 2, AB), {**FILES, "label_column": "kin"}, "did you mean 'kind'"),
    "no label column": (parquet(4, ["a", "b"] * 2, TEXT), {**FILES, "image_column": "kind"}, "data.label_column of"),
    "two image columns": (two_images, FILES, "data.image_column of .* could mean 'left', 'right': name it"),
    "fractions as labels": (parquet(2, [0.1, 0.2], datasets.Value("float32")), KIND, "holds float32, not a class"),
    "image without label": (
        parquet(3, ["a", None, "b"], TEXT),
        KIND,
        "1 of 3 images have no label, the first in row 1",
    ),
    "image with label -1": (parquet(4, [0, 1, -1, 0], AB), FILES, "1 of 4 images have no label"),
    "class named but absent": (parquet(4, [0, 1] * 2, ABC), FILES, "no training image of the class 'c'"),
    "number above the declared classes": (parquet(4, [0, 5] * 2, NUMBER), KIND | {"classes": 2}, "has the class 5"),
    "split without the column": (both(TRAIN, other_column), FILES, "split 'val' of .* has no column 'kind'"),
    "some names without split": (both(TRAIN, parquet(2, [0, 1], AB, "more")), FILES, "more.parquet holds no split"),
    "empty file": (file("x.parquet", b""), FILES, "x.parquet is empty"),
    "no rows": (EMPTY, FILES, "is empty"),
    "damaged parquet": (file("x.parquet", b"PAR1 and more"), FILES, r"\*.parquet cannot be loaded"),
    "damaged tar": (cut_tar, {"source": "{root}/*.tar"}, "cannot be loaded"),
    "damaged save_to_disk folder": (damaged_disk, {}, "cannot be loaded"),
    "mixed kinds": (both(file("x.tar", b"x"), TRAIN), {"source": "{root}/*"}, "files of the kinds '.parquet', '.tar'"),
    "stream without validation": (TRAIN, STREAM, "needs a validation split"),
    "stream with samples": (both(TRAIN, VAL), STREAM | {"train_samples": 2}, "data.train_samples cannot be chosen"),
    "stream with domains": (TRAIN, STREAM | {"domain_column": "kind"}, "data.domain_column is not read from a stream"),
    "stream without rows": (both(EMPTY, VAL), STREAM, "is empty"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_set_is_one_line_that_names_it(name, tmp_path, capfd):
    make, options, message = CASES[name]
    make(tmp_path)
    options = {"source": "{root}"} | options
    options["source"] = options["source"].format(root=tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load_splits(Data(**options), seed=1)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("offline", [True, False])
def test_unreachable_hub_names_the_ways_out(offline, monkeypatch):
    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="dataset 'user/flowers'.* a local folder") as caught:
        load_splits(Data(source="user/flowers"), seed=1)
    assert all(way in str(caught.value) for way in ("local folder", "save_to_disk", "HF_HUB_OFFLINE=1"))
    assert "\n" not in str(caught.value)


def test_misspelt_demo_is_recognised(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="did you mean 'demo'"):
        load_splits(Data(source="dmeo"), seed=1)


def test_file_names_that_are_not_unicode(tmp_path):
    root = write_folder(tmp_path, {"a": 2, "b": 2})
    (root / "a" / "000.png").rename(root / "a" / "bad\udcff.png")
    with pytest.raises(DataError, match="not valid UTF-8"):
        load_splits(Data(source=str(root)), seed=1)
