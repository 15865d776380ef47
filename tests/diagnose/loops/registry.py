"""The loops by name: what each is, and what the doctor has to say about it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings

_MODULES = ("classifiers", "frameworks", "dense", "pairs", "steps", "averages", "processes")

Run = Callable[[int, bool], Findings]


@dataclass(frozen=True)
class Loop:
    """One way to train that people copy.

    Attributes:
        name: of the loop.
        source: the documentation that teaches it.
        fault: what is planted, in a few words.
        rule: code of the rule that finds the fault.
        run: trains with a seed, faulty or not, and gives back all that the doctor says.
        notes: codes of findings of severity info that are true of the sound loop, each with the reason.
        also: codes of rules that the fault breaks besides, each with the reason.
        needs: package without which it cannot run.
    """

    name: str
    source: str
    fault: str
    rule: str
    run: Run
    notes: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None


_LOOPS: dict[str, Loop] = {}

DECAYED = {"BN503": "one parameter group for everything, as the reference has it"}


def loop(
    name: str,
    *,
    source: str,
    fault: str,
    rule: str,
    notes: Mapping[str, str] | None = None,
    also: Mapping[str, str] | None = None,
    needs: str | None = None,
) -> Callable[[Run], Run]:
    """Enter a function `run(seed, planted)` in the table of loops."""

    def enter(run: Run) -> Run:
        assert name not in _LOOPS, f"two loops {name}"
        _LOOPS[name] = Loop(name, source, fault, rule, run, notes or {}, also or {}, needs)
        return run

    return enter


@cache
def all_loops() -> dict[str, Loop]:
    """Every loop by name, in the order of the modules."""
    for module in _MODULES:
        importlib.import_module(f"tests.diagnose.loops.{module}")
    return dict(_LOOPS)


def said(*parts: Findings) -> Findings:
    """What the doctor said of the set-up and of the steps, together."""
    unjudged = {code: lacking for part in parts for code, lacking in part.unjudged.items()}
    return Findings(dict.fromkeys(found for part in parts for found in part), unjudged)


def judged(watch: bnf.watch_bn, model: nn.Module, *set_up: Any, **more: Any) -> Findings:
    """What the doctor said of the steps, and says of the set-up as it goes on to train; arguments as of `check_bn`."""
    model.train()
    return said(watch.findings, bnf.check_bn(model, *set_up, **more))
