"""Killed at any moment and started again, a run gives bit for bit what one gives that was never killed."""

import json
import random
import signal

import pytest

from tests.training.killing import OPTIONS, Kill, differences, moments_of, outcome, train_until
from tests.training.support import write_images

UPDATES_SAVED = 2  # checkpoint.every_steps of these runs
RANDOM_TIME = 5  # each so many kills come by the clock, at a moment that no call marks


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=8)  # 6 batches of 4, 3 updates of 2 batches


def far_enough(run, share, updates):
    """Updates that a start may come to before it is killed, so that the kills spread over the run."""
    reached = max((int(path.name[-8:]) for path in run.glob("checkpoints/update-????????")), default=0)
    ahead = UPDATES_SAVED if reached > share * updates else 3 * UPDATES_SAVED
    return min(ahead, updates - reached)


def kill_often(nursery, options, ranks, kills, seed):
    """Start the run again and again, each time to be killed; how many kills came in which phase."""
    moments = [json.loads(moments_of(options, rank).read_text()) for rank in range(ranks)]
    updates = options["train.epochs"] * 3
    rng, done = random.Random(seed), []
    options = {**options, "train.resume": "auto"}
    phases = ["step", "saving", "evaluation", "re-estimation"]
    while len(done) < kills:
        phase = phases[len(done) % len(phases)]
        ahead = far_enough(options["run.dir"], len(done) / kills, updates)
        rank = 0 if phase == "saving" else rng.randrange(ranks)  # only the first rank writes
        number = rng.randrange(ahead * moments[rank][phase] // (updates + 1) + 1)
        if len(done) == kills - 1 or not ahead:
            phase, rank = "finish", 0
            number = rng.randrange(moments[rank][phase])
        elif len(done) % RANDOM_TIME == RANDOM_TIME - 1:
            phase = "clock"
        kill = None if phase == "clock" else Kill(phase, number, rank)
        after = rng.uniform(0.05, 0.5) if phase == "clock" else None
        codes = nursery.run(train_until, kill, options, ranks=ranks, kill_after=after)
        assert set(codes) <= {0, 1, -signal.SIGKILL}, nursery.said()
        assert -signal.SIGKILL in codes, f"{phase} {number} never came, after {len(done)} kills: {nursery.said()}"
        done.append(phase)
    assert nursery.run(train_until, None, options, ranks=ranks) == [0] * ranks, nursery.said()
    return done


def check(ranks, workers, kills, epochs, nursery, images, tmp_path):
    options = {
        **OPTIONS,
        "data.source": images,
        "data.workers": workers,
        "train.batch_size": 4 // ranks,
        "train.epochs": epochs,
        "checkpoint.every_steps": UPDATES_SAVED,
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert nursery.run(train_until, None, {**options, "run.dir": whole}, ranks=ranks) == [0] * ranks, nursery.said()
    done = kill_often(nursery, {**options, "run.dir": run}, ranks, kills, f"{ranks} ranks, {workers} workers")
    assert differences(outcome(whole), outcome(run)) == []
    return done


def test_five_kills_of_two_ranks_leave_no_trace(nursery, images, tmp_path):
    done = check(2, 0, 5, 2, nursery, images, tmp_path)
    assert done == ["step", "saving", "evaluation", "re-estimation", "finish"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "workers"), [(2, 2), *(pytest.param(*each, marks=pytest.mark.long) for each in ((1, 0), (1, 2), (2, 0)))]
)
def test_many_kills_leave_no_trace(ranks, workers, nursery, images, tmp_path):
    done = check(ranks, workers, 20, 6, nursery, images, tmp_path)
    assert {"step", "saving", "evaluation", "re-estimation", "clock", "finish"} == set(done)


@pytest.mark.slow
def test_a_difference_would_be_seen(nursery, images, tmp_path):
    options = {**OPTIONS, "data.source": images, "data.workers": 0, "train.epochs": 1}
    for number, seed in enumerate((1, 1, 2)):
        run = {**options, "run.dir": tmp_path / str(number), "run.seed": seed}
        assert nursery.run(train_until, None, run) == [0], nursery.said()
    one, same, other = (outcome(tmp_path / str(number)) for number in range(3))
    assert differences(one, same) == []
    found = " ".join(differences(one, other))
    for part in ("best/model.safetensors", "running_mean", "optimizer", "random", "metrics.jsonl", "ema.safetensors"):
        assert part in found
