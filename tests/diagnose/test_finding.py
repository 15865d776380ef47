"""Names made short, and findings as text."""

import json
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings, as_globs, render, scope_of
from bnfinetune.diagnose.sarif import as_sarif
from tests.diagnose.support import codes, network

parts = st.sampled_from(["a", "b", "1", "bn[0]", "layer*"])
names = st.lists(st.lists(parts, min_size=1, max_size=3).map(".".join), min_size=1, max_size=12, unique=True)


@given(names, st.data())
def test_globs_match_exactly_the_names(universe, data):
    wanted = data.draw(st.lists(st.sampled_from(universe), min_size=1, unique=True))
    plain = [name for name in universe if "*" not in name]
    wanted = [name for name in wanted if name in plain]
    if wanted:
        globs = as_globs(wanted, plain)
        assert {name for name in plain if any(fnmatchcase(name, glob) for glob in globs)} == set(wanted)


def test_globs_are_few():
    layers = list(bnf.find_bn_layers(network("resnet18")))
    assert as_globs(layers, layers) == ("*",)
    assert as_globs([name for name in layers if name.startswith("layer1.")], layers) == ("layer1.*",)
    assert as_globs(["layer1.0.bn1"], layers) == ("layer1.0.bn1",)
    assert scope_of(layers, layers) == "all 20 BN layers"


@pytest.fixture(scope="module")
def findings():
    model = network("resnet18")
    model.layer1.requires_grad_(False)
    model.bn1.momentum = 0.9
    return bnf.check_bn(model, batch_size=2)


def test_forms(findings):
    assert [found.code for found in findings] == ["BN102", "BN106", "BN206"]
    assert findings.exit_code == 1
    assert Findings(findings[1:]).exit_code == 0
    for text in (render(findings), render(findings, color=True), str(findings)):
        assert all(found.code in text and found.why.split()[0] in text for found in findings)
    read = json.loads(render(findings, "json"))
    assert [each["code"] for each in read] == [found.code for found in findings]
    assert read[0]["where"] == list(findings[0].where)
    lines = render(findings, "lines").splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith(f"{len(findings.unjudged)} rules had nothing to look at: no optimizer, ")
    assert lines[0].split(maxsplit=2)[:2] == ["BN102", "layer1.*"]


def test_a_notebook_gets_the_same_text(findings, monkeypatch):
    plain = str(findings)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(findings) == plain


def test_sarif_holds_what_hosts_ask_for(findings):
    """What GitHub's documentation requires of an upload, and that indices hang together."""
    log = json.loads(as_sarif(findings, "mine.yaml"))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == sorted({found.code for found in findings})
    for found, result in zip(findings, run["results"], strict=True):
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == found.code
        assert result["level"] == {"error": "error", "warning": "warning", "info": "note"}[found.severity]
        assert found.measured in result["message"]["text"]
        assert found.fix in result["message"]["text"]
        (place,) = result["locations"]
        assert place["physicalLocation"]["artifactLocation"]["uri"] == "mine.yaml"
        assert [each["fullyQualifiedName"] for each in place.get("logicalLocations", [])] == list(found.where)
    assert json.loads(as_sarif([], "mine.yaml"))["runs"][0]["results"] == []


def test_nothing_found_says_so():
    assert render([]) == "no BatchNorm pitfall found"
    assert render([], "json") == "[]"
    assert render([], "lines") == ""


def test_unknown_forms_are_refused(findings):
    with pytest.raises(ValueError, match="not one of table, json, lines"):
        render(findings, "yaml")


def test_rules_can_be_left_out(findings):
    model = network("resnet18")
    assert codes(bnf.check_bn(model, batch_size=2, ignore=["BN206"])) == set()
    with pytest.raises(bnf.errors.SelectionError, match="no rule 'BN2O6'; nearest: BN2"):
        bnf.check_bn(model, ignore=["BN2O6"])
