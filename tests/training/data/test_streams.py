import datasets
import pytest
import torch

from bnfinetune.errors import DataError
from bnfinetune.recipe import Augment, Data
from bnfinetune.training.data import Loaders, build_loaders, build_transforms, load_splits
from tests.training.data.conftest import DATA_CONFIG, table, write_folder, write_tar

CLASSES = datasets.ClassLabel(names=["x", "y", "z"])


@pytest.fixture
def shards(tmp_path):
    """Four parquet files of 5 to 8 training images, and one of 7 validation images."""
    for shard in range(4):
        rows = table(5 + shard, [row % 3 for row in range(5 + shard)], CLASSES, seed=100 * shard)
        rows.to_parquet(tmp_path / f"train-{shard}.parquet")
    table(7, [row % 3 for row in range(7)], CLASSES, seed=900).to_parquet(tmp_path / "val-0.parquet")
    return f"{tmp_path}/*.parquet"


def loaders(source: str, batch_size: int = 4, **options) -> Loaders:
    ranks = {key: options.pop(key) for key in ("rank", "world_size") if key in options}
    augment = Augment(auto_augment="rand-m9-mstd0.5", random_erasing=0.5)
    data = Data(source=source, streaming=True, **({"workers": 0, "augment": augment, "shuffle_buffer": 6} | options))
    transforms = build_transforms(data, DATA_CONFIG)
    return build_loaders(
        load_splits(data, 1), transforms, data, batch_size=batch_size, eval_batch_size=5, seed=1, **ranks
    )


def take(loader, count: int) -> list:
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def same(some, others) -> bool:
    return len(some) == len(others) and all(
        all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) for one, other in zip(some, others, strict=True)
    )


def looks(batches) -> list[int]:
    """A number per image that tells clean images apart."""
    return [round(float(image.double().sum()) * 1e3) for batch in batches for image in batch[0]]


def test_stream_is_one_endless_shuffled_epoch(shards):
    built = loaders(shards)
    assert built.train.batches is None
    batches = take(built.train, 14)
    assert all(len(labels) == 4 for _, labels in batches)
    labels = torch.cat([labels for _, labels in batches]).tolist()
    each_pass = [sorted(labels[:26]), sorted(labels[26:52])]  # of 26 images
    assert each_pass[0] == each_pass[1] == sorted(row % 3 for shard in range(4) for row in range(5 + shard))
    assert labels[:26] != labels[26:52]


def test_any_start_and_any_workers_give_the_same_batches(shards):
    whole = take(loaders(shards).train, 16)
    for workers, start in [(0, 3), (0, 13), (2, 0), (2, 15)]:  # 13 and 15 lie in the second and third pass
        built = loaders(shards, workers=workers)
        built.train.set_position(0, start)
        assert same(take(built.train, 16 - start), whole[start:])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_two_images_of_a_pass_share_a_number(shards, world_size):
    numbers = []
    for rank in range(world_size):
        sampler = loaders(shards, rank=rank, world_size=world_size).stats.batch_sampler
        numbers.extend(pick.number for batch in sampler for pick in batch)
    assert len(set(numbers)) == len(numbers) == 26


def test_other_epochs_do_not_exist(shards):
    with pytest.raises(ValueError, match="one endless epoch"):
        loaders(shards).train.set_position(1)


@pytest.mark.parametrize("world_size", [2, 3, 4])  # 3 does not divide the 4 shards
def test_ranks_share_the_images(shards, world_size):
    whole = sorted(looks(loaders(shards).stats))
    ranks = [loaders(shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(look for rank in ranks for look in looks(rank.stats)) == whole
    assert sorted(look for rank in ranks for look in looks(rank.val)) == sorted(looks(loaders(shards).val))
    assert len(whole) == 26


def test_shuffling_depends_on_the_seed_and_the_buffer(shards):
    ordered = looks(loaders(shards, shuffle_buffer=1).stats)
    assert sorted(ordered) == sorted(looks(loaders(shards).stats))
    assert ordered != looks(loaders(shards).stats)


def test_webdataset_stream_with_declared_classes(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"train-{shard}.tar", [(f"{shard}{row}", row % 3) for row in range(6)], seed=10 * shard)
    write_tar(tmp_path / "val-0.tar", [(f"v{row}", row % 3) for row in range(3)], seed=50)
    source = f"{tmp_path}/*.tar"
    with pytest.raises(DataError, match=r"set data.classes to their number or names"):
        loaders(source)
    built = loaders(source, classes=3)
    assert torch.cat([labels for _, labels, _ in built.val]).tolist() == [0, 1, 2]
    splits = load_splits(Data(source=source, streaming=True, classes=("p", "q", "r")), 1)
    assert splits.class_names == ("p", "q", "r")
    with pytest.raises(DataError, match="the stream cannot be read on"):
        list(loaders(source, classes=2).val)


def test_text_labels_of_a_stream(tmp_path):
    for split, seed in {"train": 0, "val": 60}.items():
        rows = table(6, ["cat", "dog"] * 3, datasets.Value("string"), seed)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    built = loaders(f"{tmp_path}/*.parquet", classes=("cat", "dog"))
    assert torch.cat([labels for _, labels, _ in built.val]).tolist() == [0, 1] * 3


def test_set_in_memory_can_be_read_as_a_stream(tmp_path):
    root = write_folder(tmp_path / "pets", {"a": 10, "b": 10})
    built = loaders(str(root))
    assert built.train.batches is None
    assert len(looks(built.val)) == 4
    assert len(looks(built.stats)) == 16
    assert len(take(built.train, 9)) == 9


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_of_a_stream(tmp_path, workers):
    rows = table(8, [0, 1] * 4, datasets.ClassLabel(names=["x", "y"]))
    raw = rows.cast_column("picture", datasets.Image(decode=False)).to_list()
    raw[5]["picture"] = {"bytes": b"no image", "path": "five.png"}
    broken = datasets.Dataset.from_list(raw, features=rows.features)
    broken.to_parquet(tmp_path / "train.parquet")
    rows.to_parquet(tmp_path / "val.parquet")
    source = f"{tmp_path}/*.parquet"
    with pytest.raises(DataError, match=r"in row \d+ of split 'train' of .* \(five.png\): it is not an image"):
        take(loaders(source, workers=workers).train, 2)
    built = loaders(source, workers=workers, on_error="skip")
    assert [len(labels) for _, labels in take(built.train, 2)] == [4, 4]
    assert len(built.skipped) == 1
    assert sum(len(labels) for _, labels in built.stats) == 7


def test_stream_with_fewer_images_than_ranks(tmp_path):
    for split in ("train", "val"):
        table(2, [0, 1], datasets.ClassLabel(names=["x", "y"])).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match="no image for every process"):
        take(loaders(f"{tmp_path}/*.parquet", rank=2, world_size=3).train, 1)
