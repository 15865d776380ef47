import os
import pickle
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from bnfinetune.errors import DataError
from bnfinetune.recipe import Augment, Data
from bnfinetune.training.data import Loaders, build_loaders, build_transforms, load_splits
from bnfinetune.training.data.loaders import default_workers
from bnfinetune.training.data.sampling import Pick
from tests.training.data.conftest import DATA_CONFIG, write_folder

STRONG = Augment(auto_augment="rand-m9-mstd0.5", random_erasing=0.5, color_jitter=0.3)
COUNTS = {"train/a": 9, "train/b": 12, "val/a": 3, "val/b": 4}


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pets", COUNTS)


def loaders(root: Path, batch_size: int = 4, **options) -> Loaders:
    ranks = {key: options.pop(key) for key in ("rank", "world_size", "device") if key in options}
    eval_batch_size = options.pop("eval_batch_size", 5)
    data = Data(source=str(root), **({"workers": 0, "augment": STRONG} | options))
    transforms = build_transforms(data, DATA_CONFIG)
    splits = load_splits(data, seed=1)
    return build_loaders(
        splits, transforms, data, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=1, **ranks
    )


def same(some, others) -> bool:
    some, others = list(some), list(others)
    return len(some) == len(others) and all(
        all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) for one, other in zip(some, others, strict=True)
    )


def test_batches_are_float_images_and_class_numbers(folder):
    built = loaders(folder)
    images, labels = next(iter(built.train))
    assert (images.dtype, tuple(images.shape)) == (torch.float32, (4, 3, 16, 16))
    assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (4,))
    assert len(built.train) == built.train.batches == 6
    assert [len(batch[1]) for batch in built.train] == [4, 4, 4, 4, 4, 1]


@pytest.mark.parametrize(("erasing", "sent"), [(0.0, torch.uint8), (0.5, torch.float32)])
def test_bytes_travel_and_the_device_normalises(folder, erasing, sent):
    """What a loader process sends, and what becomes of it: torch's `meta` device stands for any that is not the CPU."""
    built = loaders(folder, augment=Augment(random_erasing=erasing), device="meta")
    assert built.train.dataset.__getitems__([Pick(0, 0)]).images.dtype == sent
    assert built.val.dataset.__getitems__([Pick(0, 0)]).images.dtype == torch.uint8
    for loader in (built.train, built.val, built.stats, built.augmented_stats):
        images = next(iter(loader))[0]
        assert (images.device.type, images.dtype, images.shape[1:]) == ("meta", torch.float32, (3, 16, 16))


def test_augmentation_is_the_same_for_any_workers_and_start(folder):
    alone, busy = loaders(folder), loaders(folder, workers=2)
    alone.train.set_position(2)
    whole = list(alone.train)
    for start in (0, 3, 3, 1):  # the same processes begin again
        busy.train.set_position(2, start)
        assert same(busy.train, whole[start:])
    alone.train.set_position(2, 4)
    assert same(alone.train, whole[4:])


def test_abandoned_epoch_does_not_disturb_the_next(folder):
    for workers in (0, 2):
        built = loaders(folder, workers=workers)
        built.train.set_position(1)
        whole = list(built.train)
        built.train.set_position(0)
        next(iter(built.train))
        built.train.set_position(1)
        assert same(built.train, whole)


def test_epochs_follow_each_other_unasked(folder):
    built = loaders(folder)
    first, second = list(built.train), list(built.train)
    assert not same(first, second)
    built.train.set_position(1)
    assert same(built.train, second)


def test_global_batches_of_ranks_are_those_of_one_process(folder):
    whole = list(loaders(folder, batch_size=6).train)
    halves = [list(loaders(folder, batch_size=3, rank=rank, world_size=2).train) for rank in (0, 1)]
    joined = [[torch.cat(parts) for parts in zip(*pair, strict=True)] for pair in zip(*halves, strict=True)]
    assert same(joined, whole)


def test_loading_leaves_global_generators_alone(folder):
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    for workers in (0, 2):
        built = loaders(folder, workers=workers)
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        expected = draws()
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        for loader in (built.train, built.val, built.stats):
            list(loader)
        assert draws() == expected


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_evaluation_gives_every_image_once_with_its_index(folder, world_size, workers):
    seen: dict[int, tuple[torch.Tensor, int]] = {}
    for rank in range(world_size):
        for images, labels, indices in loaders(folder, rank=rank, world_size=world_size, workers=workers).val:
            for image, label, index in zip(images, labels, indices, strict=True):
                assert int(index) not in seen
                seen[int(index)] = image, int(label)
    data = Data(source=str(folder))
    split, transform = load_splits(data, 1).val, build_transforms(data, DATA_CONFIG).eval
    from bnfinetune.training.data.images import open_image

    assert sorted(seen) == list(range(7))
    for index, (image, label) in seen.items():
        assert torch.equal(image, transform(open_image(split[index]["image"], "", 10**6)))
        assert label == split[index]["label"]


def test_what_is_kept_of_an_evaluation_is_not_what_is_given_out(folder):
    built = loaders(folder)
    first = [[part.clone() for part in batch] for batch in built.val]
    for batch in built.val:
        batch[0].zero_()  # what is kept must not be what is given out
    assert same(built.val, first)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_statistics_see_clean_training_images_once_in_shuffled_even_batches(folder, world_size):
    ranks = [list(loaders(folder, rank=rank, world_size=world_size).stats) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    sizes = [len(labels) for rank in ranks for _, labels in rank]
    assert sum(sizes) == 21
    assert max(sizes) <= 5
    assert max(sizes) - min(sizes) <= 1
    data = Data(source=str(folder), val_split="train", train_split="val")
    clean = [
        image
        for images, _, _ in loaders(folder, **data.model_dump(include={"val_split", "train_split"})).val
        for image in images
    ]
    seen = [image for rank in ranks for images, _ in rank for image in images]
    assert sorted(image.sum().item() for image in seen) == sorted(image.sum().item() for image in clean)
    labels = [int(label) for rank in ranks for _, batch in rank for label in batch]
    assert labels != sorted(labels)


def test_statistics_are_the_same_in_every_iteration(folder):
    built = loaders(folder)
    assert same(list(built.stats), list(built.stats))
    assert same(list(built.augmented_stats), list(built.augmented_stats))
    assert not same(list(built.stats), list(built.augmented_stats))


def test_augmented_statistics_do_not_disturb_training(folder):
    alone, built = loaders(folder), loaders(folder, workers=2)
    batches = iter(built.train)
    begun = [next(batches), next(batches)]
    assert len(list(built.augmented_stats)) == 5
    assert same([*begun, *batches], list(alone.train))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_images_to_adapt_to_come_shuffled_once_over_all_ranks(folder, world_size):
    swapped = {"train_split": "val", "val_split": "train"}
    ranks = [loaders(folder, rank=rank, world_size=world_size, **swapped) for rank in range(world_size)]
    assert set(ranks[0].targets) == {"validation"}
    targets = [list(rank.targets["validation"]) for rank in ranks]
    assert all(same(list(rank.targets["validation"]), seen) for rank, seen in zip(ranks, targets, strict=True))
    stored = [image.sum().item() for rank in ranks for images, _, _ in rank.val for image in images]
    seen = [image.sum().item() for rank in targets for images, _ in rank for image in images]
    assert sorted(seen) == sorted(stored)
    assert seen != stored
    labels = [int(label) for rank in targets for _, batch in rank for label in batch]
    assert labels != sorted(labels)


def test_remainder_is_dropped_on_request(folder):
    built = loaders(folder)
    assert built.train.drop_remainder(2) == 1
    assert len(built.train) == 5
    assert all(len(labels) == 4 for _, labels in built.train)


def test_readers_travel_to_spawned_processes(folder):
    built = loaders(folder)
    reader = pickle.loads(pickle.dumps(built.train.dataset))
    picks = next(iter(built.train.batch_sampler))
    assert torch.equal(reader.__getitems__(picks).images, built.train.dataset.__getitems__(picks).images)


def spoil(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:60])
    return path


@pytest.fixture
def unchecked(monkeypatch):
    """Let unreadable images through to the loaders, as those of a large set are."""
    monkeypatch.setattr("bnfinetune.training.data.splits.unreadable_images", lambda *_: {})


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_ends_the_epoch_with_its_path(folder, workers, unchecked):
    broken = spoil(folder / "train" / "b" / "003.png")
    built = loaders(folder, workers=workers)
    with pytest.raises(DataError) as caught:
        list(built.train)
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_training_images_are_replaced_by_a_neighbour(folder, workers, unchecked):
    sound = list(loaders(folder).train)
    broken = spoil(folder / "train" / "b" / "003.png")
    built = loaders(folder, workers=workers, on_error="skip")
    batches = list(built.train)
    assert [len(labels) for _, labels in batches] == [len(labels) for _, labels in sound]
    assert [str(broken) in line for line in built.skipped] == [True]
    changed = [
        number
        for number, (one, other) in enumerate(zip(batches, sound, strict=True))
        if not torch.equal(one[0], other[0])
    ]
    assert len(changed) == 1
    assert same([(labels,) for _, labels in batches], [(labels,) for _, labels in sound])


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_evaluation_images_are_left_out(folder, workers, unchecked):
    for number in range(3):
        spoil(folder / "val" / "a" / f"{number:03}.png")
    spoil(folder / "val" / "b" / "001.png")
    built = loaders(folder, workers=workers, on_error="skip", eval_batch_size=3)
    batches = list(built.val)
    assert [indices.tolist() for _, _, indices in batches] == [[3, 5], [6]]
    assert len(built.skipped) == 4


def test_nothing_readable_is_an_error_even_when_skipping(folder, unchecked):
    for path in (folder / "train").rglob("*.png"):
        spoil(path)
    with pytest.raises(DataError, match="no readable image near"):
        list(loaders(folder, on_error="skip").train)


def test_folder_that_vanishes_is_named(folder):
    built = loaders(folder)
    for path in (folder / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"val/a/000.png: the file is gone"):
        list(built.val)


@pytest.mark.parametrize("loader", ["train", "val", "stats"])
def test_closing_ends_the_processes_and_allows_another_iteration(folder, loader):
    loader = getattr(loaders(folder, workers=2), loader)
    batches = iter(loader)
    next(batches)
    processes = loader._running._workers
    assert all(process.is_alive() for process in processes)
    loader.close()
    loader.close()
    assert not any(process.is_alive() for process in processes)
    assert len(list(loader)) == len(loader)


def test_an_error_ends_the_processes(folder, unchecked):
    spoil(folder / "train" / "b" / "003.png")
    loader = loaders(folder, workers=2).train
    processes = []

    def run() -> None:
        for _ in loader:
            processes.extend(loader._running._workers)

    with pytest.raises(DataError):
        run()
    assert processes
    assert not any(process.is_alive() for process in processes)


class KillsItself:
    """A transform that ends the process it runs in."""

    def __init__(self, transform) -> None:
        self.finish, self.erase, self.shortest = transform.finish, None, None

    def draw(self, image):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_one_line(folder):
    built = loaders(folder, workers=1)
    built.val.dataset.transform = KillsItself(built.val.dataset.transform)
    with pytest.raises(DataError, match=r"worker .*(killed|exited).*lower data.workers") as caught:
        list(built.val)
    assert "\n" not in str(caught.value)


def test_default_workers_follow_the_cores_of_a_rank(monkeypatch):
    monkeypatch.setattr("bnfinetune.training.data.loaders._cores", lambda: 24)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers(Data(source="x"), 1) == 16
    assert default_workers(Data(source="x"), 8) == 3
    assert default_workers(Data(source="x"), 32) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers(Data(source="x"), 32) == 6
    assert default_workers(Data(source="demo"), 1) == 0


def test_demo_needs_no_worker_and_no_shuffled_labels():
    data = Data(train_samples=50)
    built = build_loaders(
        load_splits(data, 1), build_transforms(data, DATA_CONFIG), data, batch_size=8, eval_batch_size=256, seed=1
    )
    assert built.train.num_workers == built.val.num_workers == 0
    counts = torch.bincount(torch.cat([labels for _, labels in built.train]))
    assert counts.tolist() == [5] * 10
