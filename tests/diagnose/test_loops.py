"""Ordinary training loops are not accused of anything, and a fault that is planted in each is found."""

import warnings

import pytest

from bnfinetune.diagnose.finding import render
from bnfinetune.diagnose.registry import all_rules
from tests.bench.loops import PAGE, page_table
from tests.bench.results import recorded
from tests.diagnose.loops.registry import all_loops
from tests.diagnose.support import codes

QUICK, ALL = range(2), range(20)


@pytest.fixture(params=all_loops())
def loop(request):
    found = all_loops()[request.param]
    if found.needs is not None:
        pytest.importorskip(found.needs)
    return found


def is_silent(loop, seed):
    """Says nothing but what is true of the loop, and has seen it train."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as from batches that could not be run again
        warnings.filterwarnings("ignore", module=r"(?!bnfinetune|tests)")
        found = loop.run(seed, False)
    assert codes(found) <= loop.notes.keys(), render(found, "lines")
    assert "no training step" not in found.unjudged.values()
    assert all(each.severity == "info" for each in found)


@pytest.mark.parametrize("seed", QUICK)
def test_sound_loops_are_silent(loop, seed):
    is_silent(loop, seed)


@pytest.mark.slow
@pytest.mark.long
def test_sound_loops_are_silent_whatever_the_seed(loop):
    for seed in ALL:
        is_silent(loop, seed)


def test_planted_faults_are_found(loop):
    found = codes(loop.run(0, True))
    assert loop.rule in found
    assert found <= {loop.rule, *loop.also, *loop.notes}


def test_what_the_loops_say_of_themselves():
    loops = all_loops().values()
    assert len(loops) >= 20
    rules = all_rules()
    for loop in loops:
        assert {loop.rule, *loop.notes, *loop.also} <= rules.keys()
        assert all(rules[code].severity == "info" for code in loop.notes), "warnings and errors are no notes"
    assert len({loop.rule for loop in loops}) >= 12


def test_the_page_is_of_these_loops():
    page = PAGE.read_text(encoding="utf-8")
    assert recorded("loops").keys() == all_loops().keys()
    assert page_table() in page


def test_what_was_measured_is_as_it_must_be():
    for name, figures in recorded("loops").items():
        assert (figures["seeds"], figures["false_alarms"]) == (len(ALL), 0), name
        assert figures["found"] == figures["planted_seeds"] > 0, name
