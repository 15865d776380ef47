"""Saves that are asked for from outside, and on the way out of an error: after an update, and changing nothing."""

import os
import signal

import pytest

from bnfinetune.errors import DataError
from bnfinetune.training.data.loaders import TrainLoader
from bnfinetune.training.loop import trainer as loop
from bnfinetune.training.loop.requests import Asked, Requests
from bnfinetune.training.run import finetune
from tests.training.killing import OPTIONS, differences, outcome
from tests.training.support import write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=8)  # 6 batches of 4, 3 updates of 2 batches


def train(options):
    finetune("full", **options)


def train_with_signal(options, number, update, victim, *, group=False):
    """Train; in the midst of an update one rank sends itself a signal, or the loader's processes too."""
    compute = loop.Gradients.compute
    calls = []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == update and int(os.environ.get("RANK", "0")) == victim:
            os.killpg(0, number) if group else os.kill(os.getpid(), number)
        return compute(self, *args)

    loop.Gradients.compute = interrupted
    finetune("full", **options)


def train_with_broken_image(options, batches):
    emit = TrainLoader.emit
    calls = []

    def broken(self, batch):
        if isinstance(self, TrainLoader):
            calls.append(1)
            if len(calls) > batches:
                raise DataError("cannot read the image 7.png")
        return emit(self, batch)

    TrainLoader.emit = broken
    finetune("full", **options)


def saved(run):
    return sorted(int(path.name[-8:]) for path in (run / "checkpoints").iterdir())


def assert_same(tmp_path):
    whole, run = outcome(tmp_path / "whole"), outcome(tmp_path / "run")
    del whole["states"], run["states"]
    assert differences(whole, run) == []


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["one process", "two ranks"])
def runs(request, nursery, images, tmp_path):
    """Options of a run, the number of its ranks, and beside it what the run gives that nobody interrupts."""
    options = {**OPTIONS, "data.source": images, "data.workers": 0, "train.batch_size": 4 // request.param}
    del options["checkpoint.every_steps"]
    assert nursery.run(train, options | {"run.dir": tmp_path / "whole"}, ranks=request.param) == [0] * request.param
    return options | {"run.dir": tmp_path / "run"}, request.param


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow)]
)
def test_a_signal_to_any_rank_saves_after_the_update_and_ends_all(number, code, runs, nursery, tmp_path):
    options, ranks = runs
    # each rank ends by itself; a launcher's kill of the slower one would hide whether it does
    codes = nursery.run(train_with_signal, options, number, 5, ranks - 1, ranks=ranks, kill_others=False)
    assert codes == [code] * ranks, nursery.said()
    assert f"{number.name}: saved after update 5; go on with train.resume=auto" in nursery.said()
    assert saved(tmp_path / "run") == [3, 5]
    assert nursery.run(train, options | {"train.resume": "auto"}, ranks=ranks) == [0] * ranks, nursery.said()
    assert_same(tmp_path)


@pytest.mark.slow
def test_a_request_to_save_saves_and_the_run_goes_on_as_if_nothing_had_been(runs, nursery, tmp_path):
    options, ranks = runs
    options["checkpoint.keep"] = 20
    assert nursery.run(train_with_signal, options, signal.SIGUSR1, 5, ranks - 1, ranks=ranks) == [0] * ranks
    assert saved(tmp_path / "run") == [3, 5, 6, 9, 12]
    del options["checkpoint.keep"]
    assert_same(tmp_path)


def train_with_group_signal(options, number):
    train_with_signal(options, number, 2, 0, group=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "states"),
    [(signal.SIGUSR1, 0, [2, 3]), (signal.SIGINT, 1, [2]), (signal.SIGTERM, 143, [2])],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_signal_to_a_whole_group_of_processes_does_the_same(number, code, states, nursery, images, tmp_path):
    options = {**OPTIONS, "data.source": images, "data.workers": 2, "train.epochs": 1, "run.dir": tmp_path / "run"}
    del options["checkpoint.every_steps"]
    assert nursery.run(train_with_group_signal, options | {"train.batch_size": 4}, number) == [code], nursery.said()
    assert saved(tmp_path / "run") == states


@pytest.mark.slow
def test_saves_by_the_clock_of_the_first_rank_change_nothing(runs, nursery, tmp_path):
    options, ranks = runs
    more = {"checkpoint.keep": 20, "checkpoint.every_minutes": 1e-9}
    assert nursery.run(train, options | more, ranks=ranks) == [0] * ranks, nursery.said()
    assert saved(tmp_path / "run") == list(range(1, 13))
    assert_same(tmp_path)


@pytest.mark.slow
def test_an_error_of_the_data_saves_what_was_reached(nursery, images, tmp_path):
    options = {**OPTIONS, "data.source": images, "data.workers": 0, "train.batch_size": 4}
    del options["checkpoint.every_steps"]
    assert nursery.run(train, options | {"run.dir": tmp_path / "whole"}) == [0]
    options |= {"run.dir": tmp_path / "run", "train.resume": "auto"}
    # in the second epoch, as the batches of update 6 are read ahead of update 5
    assert nursery.run(train_with_broken_image, options, 6 + 4) == [1]
    assert "cannot read the image 7.png" in nursery.said()
    assert saved(tmp_path / "run") == [3, 4]
    assert nursery.run(train, options) == [0], nursery.said()
    assert_same(tmp_path)


def test_requests_are_heeded_within_their_context_only():
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    requests = Requests()
    with requests.heeded():
        assert requests.pending == Asked(save=False, end_by=0)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.pending == Asked(save=True, end_by=0)
        requests.saved()
        assert requests.pending == Asked(save=False, end_by=0)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.pending == Asked(save=False, end_by=signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_interrupt_ends_at_once_unless_it_is_the_launchers_echo(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("bnfinetune.training.loop.requests.time.monotonic", lambda: now[0])
    requests = Requests()
    with requests.heeded():
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert requests.pending.end_by == signal.SIGINT


def test_the_clock_starts_again_with_each_save(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("bnfinetune.training.loop.requests.time.monotonic", lambda: now[0])
    requests = Requests(minutes=2)
    for _ in range(3):
        now[0] += 119
        assert not requests.pending.save
        now[0] += 1
        assert requests.pending.save
        requests.saved()
