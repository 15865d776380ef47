"""Rules that judge by statistics accuse sound training in at most 1 % of watches."""

import pytest

from tests.bench.false_alarms import PAGE, count, page_table
from tests.bench.results import recorded
from tests.diagnose.sound_watches import KINDS, WAYS
from tests.diagnose.support import codes

MOST = 0.01


@pytest.fixture(params=WAYS)
def name(request):
    return request.param


@pytest.mark.parametrize("fused", [False, True])
def test_chance_is_no_finding(name, fused):
    for kind in KINDS:
        found = WAYS[name].run(kind, fused, 1000)
        assert WAYS[name].rule not in codes(found)
        assert WAYS[name].rule not in found.unjudged, "it must have had something to judge"


@pytest.mark.slow
@pytest.mark.long
def test_the_rate_of_false_alarms(name):
    found = count(name, seeds=13)
    assert found["judged"] == found["watches"] == 104
    assert found["false_alarms"] <= 1


def test_the_rates_that_were_measured(name):
    figures = recorded("false_alarms")[name]
    assert figures["judged"] == figures["watches"] >= 1000
    assert figures["false_alarms"] <= MOST * figures["watches"]


def test_the_page_is_of_these_rates():
    assert page_table() in PAGE.read_text(encoding="utf-8")
