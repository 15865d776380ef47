"""Every moment of a run belongs to one part of it."""

import json
import time
from contextlib import suppress

import pytest

import bnfinetune as bnf
from bnfinetune.training import stopwatch
from bnfinetune.training.stopwatch import PARTS, Stopwatch


class Clock:
    """Stands for the module `time`."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def time(self):
        return 1000.0 + self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(stopwatch, "time", clock := Clock())
    return clock


def test_what_lies_within_another_part_is_not_counted_twice(clock):
    watch = Stopwatch(began=1095.0)
    clock.now += 1
    with watch.part("evaluation"):
        clock.now += 2
        with watch.part("statistics"):
            clock.now += 3
        clock.now += 4
    with suppress(ValueError), watch.part("saving"):
        clock.now += 5
        raise ValueError
    clock.now += 6
    expected = {"import": 5, "other": 1 + 6, "evaluation": 2 + 4, "statistics": 3, "saving": 5}
    assert watch.read() == dict.fromkeys(PARTS, 0.0) | expected
    assert str(watch) == "26.0 s: the rest 7.0, evaluation 6.0, import 5.0, saving 5.0, statistics 3.0"


def test_the_parts_of_a_run_are_the_whole_run(tmp_path):
    begin = time.perf_counter()
    result = bnf.finetune("freeze_bn", **{"run.dir": tmp_path / "run", "train.epochs": 1, "data.workers": 0})
    whole = time.perf_counter() - begin
    parts = json.loads((result.folder / "summary.json").read_text())["time"]
    assert list(parts) == list(PARTS)
    assert sum(parts.values()) == pytest.approx(whole, abs=0.5)
    for part in ("set_up", "first_batch", "step", "evaluation", "statistics", "saving", "page"):
        assert parts[part] > 0, part
    assert parts["import"] == 0  # of a process that does other things besides
    assert "in all " in (result.folder / "run.log").read_text()
