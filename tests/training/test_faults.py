"""Whatever goes wrong while a state is written, one can be loaded afterwards, and never an older one than promised."""

import errno
import io
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from bnfinetune.cli import main
from bnfinetune.errors import CheckpointError
from bnfinetune.training.saving import timm_folder
from bnfinetune.training.saving.atomic import complete_folder, write_folder
from bnfinetune.training.saving.states import StateStore, load_networks, read_state
from tests.training.support import write_images

# All that the writing of a state asks of the system; torch and safetensors write their files by themselves.
CALLS = [
    *((os, name) for name in ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir")),
    (io, "open"),
    (torch, "save"),
    (timm_folder, "save_file"),
]


@contextmanager
def watched(before):
    """Call `before` before each call to the system, and after it."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in CALLS]

    def wrap(original):
        def call(*args, **kwargs):
            before()
            result = original(*args, **kwargs)
            before()
            return result

        return call

    try:
        for owner, name, original in originals:
            setattr(owner, name, wrap(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


class Countdown:
    """Does something at the n-th moment."""

    def __init__(self, moment, action):
        self.left, self.action = moment, action

    def __call__(self):
        self.left -= 1
        if self.left == -1:
            self.action()


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(action) -> int:
    """Exit code of a fork that runs `action`: 0, 3 after the error that a run reports, or minus a signal."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            action()
            code = 0
        except CheckpointError:
            code = 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def network(update):
    torch.manual_seed(update)
    return nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Conv2d(20, 100, 3))


NETWORKS = {update: network(update) for update in (1, 2, 3)}
ABOUT = {"ranks": 1, "batch_size": 4, "grad_accum": 1, "fingerprint": ""}


def save(store, update):
    state = {"progress": {"update": update}, "optimizer": torch.full((1000,), float(update))}
    store.save(update, {"model": NETWORKS[update]}, state, "name: full\n", ABOUT | {"update": update})


def assert_newest_is_one_of(store, updates):
    state, _ = store.newest()
    loaded = {"model": network(0)}
    saved = read_state(state, loaded)
    load_networks(state, saved, loaded)
    update = saved["progress"]["update"]
    assert update in updates
    for key, value in NETWORKS[update].state_dict().items():
        assert torch.equal(value, loaded["model"].state_dict()[key])


@pytest.fixture(params=[1, pytest.param(3, marks=pytest.mark.slow)], ids=["keep 1", "keep 3"])
def store(tmp_path, request):
    store = StateStore(tmp_path / "run", keep=request.param)
    save(store, 1)
    save(store, 2)
    shutil.copytree(store.folder, tmp_path / "spare")
    return store


def moments_of(action) -> int:
    count = []
    with watched(lambda: count.append(1)):
        action()
    return len(count)


def reset(store):
    shutil.rmtree(store.folder)
    shutil.copytree(store.folder.parents[1] / "spare", store.folder)


def test_a_full_disk_at_any_call_leaves_the_states_before(store):
    moments = moments_of(lambda: save(store, 3))
    assert moments > 40
    for moment in range(moments):
        reset(store)
        said = "saved"
        with watched(Countdown(moment, full_disk)):
            try:
                save(store, 3)
            except CheckpointError as error:
                said = str(error)
        assert said == "saved" or "(No space left on device); what was saved before is whole" in said
        assert_newest_is_one_of(store, {3} if said == "saved" else {2, 3})
    save(store, 3)
    assert_newest_is_one_of(store, {3})
    assert len(list(store.folder.iterdir())) == store.keep  # and nothing is left lying about


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_between_any_two_calls_leaves_a_state(stride, store):
    moments = moments_of(lambda: save(store, 3))
    for moment in range(0, moments, stride):
        reset(store)

        def killed_save(moment=moment):
            with watched(Countdown(moment, die)):
                save(store, 3)

        assert in_child(killed_save) == -signal.SIGKILL
        assert_newest_is_one_of(store, {2, 3})
        save(store, 3)
        assert_newest_is_one_of(store, {3})


@pytest.mark.parametrize("limit", [0, 10, 200, 4_000, 20_000, 70_000, 80_000, 1_000_000])
def test_a_short_write_of_any_file_is_told_and_leaves_the_states_before(store, limit):
    """A limit on the size of files cuts off the writes of torch and safetensors too."""

    def short_save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(store, 3)

    largest = max(path.stat().st_size for path in (store.folder / "update-00000002").iterdir())
    assert in_child(short_save) == (3 if limit < largest else 0)
    assert_newest_is_one_of(store, {2} if limit < largest else {3})


@pytest.mark.slow
def test_a_kill_while_the_best_network_is_replaced_leaves_one_of_the_two(tmp_path):
    target = tmp_path / "best"

    def write(text):
        write_folder(target, lambda path: (path / "a.txt").write_text(text))

    write("one")
    moments = moments_of(lambda: write("two"))
    for moment in range(moments):
        write("one")

        def killed_write(moment=moment):
            with watched(Countdown(moment, die)):
                write("two")

        assert in_child(killed_write) == -signal.SIGKILL
        assert (complete_folder(target) / "a.txt").read_text() in ("one", "two")
        write("three")
        assert (complete_folder(target) / "a.txt").read_text() == "three"
        assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "foreign"])
@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt", "manifest.json", "state.json"])
def test_a_damaged_newest_state_is_passed_over_and_named(tmp_path, damage, file):
    store = StateStore(tmp_path, keep=2)
    save(store, 1)
    save(store, 2)
    path: Path = store.folder / "update-00000002" / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        shutil.copy(store.folder / "update-00000001" / ("recipe.yaml" if file == "state.json" else file), path)
    else:
        middle = len(content) // 2
        rest = b"" if damage == "truncated" else bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:middle] + rest)
    state, passed = store.newest()
    assert state == store.folder / "update-00000001"
    assert len(passed) == 1
    assert "update-00000002 is damaged" in passed[0]
    assert_newest_is_one_of(store, {1})


def train_with_small_files(words, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main(words))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("limit", "what"), [(20_000, "the best network, "), (2_000_000, "the state ")], ids=str)
def test_a_run_that_cannot_write_ends_in_one_line(limit, what, ranks, nursery, tmp_path):
    source = write_images(tmp_path / "images")
    words = ["recipe=full", "model.name=test_resnet", "model.pretrained=false", f"data.source={source}",
             "data.image_size=32", "data.workers=0", "train.batch_size=3", f"run.dir={tmp_path / 'run'}"]  # fmt: skip
    codes = nursery.run(train_with_small_files, words, limit, ranks=ranks, kill_others=False)
    assert codes == [2] * ranks, nursery.said()
    said = [line for line in nursery.said().splitlines() if line.startswith("bnfinetune: error: ")]
    first = next(line for line in said if line.startswith(f"bnfinetune: error: {what}"))
    assert " could not be written (" in first
    assert "Traceback" not in nursery.said()


def test_save_file_is_what_writes_weights():
    assert timm_folder.save_file is safetensors.torch.save_file
