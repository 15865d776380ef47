"""Images that are decoded once, for all processes, epochs and passes that ask for them."""

import gc
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from bnfinetune.recipe import Data
from bnfinetune.training.data import decoded, reading
from bnfinetune.training.data.decoded import DecodedImages
from bnfinetune.training.data.loaders import build_loaders
from bnfinetune.training.data.splits import load_splits
from bnfinetune.training.data.transforms import build_transforms
from tests.training.data.conftest import DATA_CONFIG
from tests.training.support import write_images

IMAGES, MIB = 24, 2**20


def image(number):
    """An image of a size of its own."""
    return np.random.default_rng(number).integers(0, 256, (5 + number, 40 - number, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def refuse():
    raise AssertionError("it was decoded a second time")


def ask_for_all(shelf, made):
    """What each of several processes does, in an order of its own."""
    for number in np.random.default_rng(os.getpid()).permutation(IMAGES).tolist():

        def make(number=number):
            with made.get_lock():
                made.value += 1
            return image(number)

        assert np.array_equal(shelf.get(number, make), image(number))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_share_what_they_decode(method):
    context = multiprocessing.get_context(method)
    shelf, made = DecodedImages(MIB).shelf("train", IMAGES), context.Value("i", 0)
    for _ in range(2):  # of the first round, some may be made by several at the same time
        workers = [context.Process(target=ask_for_all, args=(shelf, made)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        first, made.value = made.value, 0
        if _ == 0:
            assert IMAGES <= first <= 3 * IMAGES
    assert first == 0
    for number in range(IMAGES):
        assert np.array_equal(shelf.get(number, refuse), image(number))


def test_one_name_is_one_place_and_a_copy_is_the_same():
    home = DecodedImages(MIB)
    home.shelf("val", 2).get(1, lambda: image(1))
    for other in (home.shelf("val", 2), pickle.loads(pickle.dumps(home.shelf("val", 2)))):
        assert np.array_equal(other.get(1, refuse), image(1))
    assert np.array_equal(home.shelf("test", 2).get(1, lambda: image(7)), image(7))


def test_a_set_that_does_not_fit_is_not_kept(tmp_path):
    size = image(0).nbytes
    for budget, kept in ((IMAGES * size - 1, False), (IMAGES * size + 10_000, True), (0, False)):
        shelf = DecodedImages(budget).shelf("train", IMAGES)
        made = []
        for _ in range(2):
            shelf.get(0, lambda made=made: made.append(1) or image(0))
        assert len(made) == (1 if kept else 2)


def test_the_budget_holds_whatever_the_first_image_promised():
    big = [np.zeros((100, 100, 3), np.uint8) for _ in range(3)]
    home = DecodedImages(70_000)
    shelf = home.shelf("train", 4)
    shelf.get(0, lambda: image(0))
    for number, pixels in enumerate(big, 1):
        assert shelf.get(number, lambda pixels=pixels: pixels).shape == (100, 100, 3)
    assert sum(path.stat().st_size for path in home.folder.iterdir()) <= 70_000
    shelf.get(2, refuse)
    with pytest.raises(AssertionError):
        shelf.get(3, refuse)


def test_a_full_disk_costs_time_and_nothing_else():
    shelf = DecodedImages(MIB).shelf("train", 2)
    shelf.get(0, lambda: image(0))
    whole, limit = resource.getrlimit(resource.RLIMIT_FSIZE), home_size(shelf) + 20
    with no_more_than(limit):  # the system writes a part, and then nothing
        for _ in range(2):
            assert np.array_equal(shelf.get(1, lambda: image(1)), image(1))
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == whole
    shelf.get(1, lambda: image(1))
    assert np.array_equal(shelf.get(1, refuse), image(1))
    assert np.array_equal(shelf.get(0, refuse), image(0))


def home_size(shelf):
    return max(path.stat().st_size for path in shelf._home.folder.iterdir())


@contextmanager
def no_more_than(size):
    """No file of this process may grow beyond a size: for Python, a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_somebody_removes_is_decoded_again_and_no_file_stays_open():
    home = DecodedImages(MIB)
    shelf = home.shelf("train", 2)
    shelf.get(0, lambda: image(0))
    other = pickle.loads(pickle.dumps(shelf))
    opened = len(os.listdir("/proc/self/fd"))
    shutil.rmtree(home.folder)
    for number in (0, 1, 1):
        assert np.array_equal(other.get(number, lambda number=number: image(number)), image(number))
    home.close()
    assert len(os.listdir("/proc/self/fd")) < opened
    assert np.array_equal(shelf.get(0, lambda: image(0)), image(0))


def test_the_folder_goes_with_its_process_and_with_nobody_elses(tmp_path):
    home = DecodedImages(MIB)
    shelf, folder = home.shelf("train", 2), home.folder
    child = multiprocessing.get_context("fork").Process(target=gc.collect)
    child.start()
    child.join()
    assert folder.is_dir()
    home.close()
    assert not folder.exists()
    assert np.array_equal(shelf.get(1, lambda: image(1)), image(1))

    home = DecodedImages(MIB)
    shelf, folder = home.shelf("train", 2), home.folder
    del home, shelf
    gc.collect()
    assert not folder.exists()

    code = (
        "import tempfile, os, signal\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "from bnfinetune.training.data.decoded import DecodedImages\n"
        "home = DecodedImages(2**20)\n"
        "home.shelf('train', 2)\n"
        "print(home.folder, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    DecodedImages(MIB).shelf("train", 2)
    assert not left.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_and_files_are_opened_once(workers, tmp_path, monkeypatch):
    source = str(write_images(tmp_path / "images"))
    log = tmp_path / "opened"
    plain = reading.open_image

    def counted(*arguments):
        with log.open("a") as file:
            file.write(f"{arguments[1]}\n")
        return plain(*arguments)

    monkeypatch.setattr(reading, "open_image", counted)

    def batches(**changed):
        data = Data(source=source, workers=workers, **changed)
        built = build_loaders(
            load_splits(data, 0), build_transforms(data, DATA_CONFIG), data, batch_size=4, eval_batch_size=4, seed=0
        )
        loaders = [built.train, built.val, built.stats]
        try:
            return [[part.clone() for part in batch] for loader in 3 * loaders for batch in loader]
        finally:
            built.close()

    kept = batches()
    opened = log.read_text().split("\n")[:-1]
    assert len(opened) == len(set(opened)) + 18  # training images for training, and drawn as for evaluation
    log.unlink()
    again = batches(decoded_cache=0)
    assert len(log.read_text().split("\n")[:-1]) == 3 * (18 + 9 + 18)
    for one, other in zip(kept, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_nothing_is_swept_that_may_still_be_used(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours, theirs = decoded._prefix(), f"{decoded._PREFIX}another-machine-"
    for name in (f"{ours}{os.getpid()}-x", f"{ours}mine", f"{theirs}{gone.pid}-x", "other", f"{ours}{gone.pid}-x"):
        (tmp_path / name).mkdir()
    decoded._sweep()
    assert len(list(tmp_path.iterdir())) == 4
    assert not (tmp_path / f"{ours}{gone.pid}-x").exists()
