"""The rules of the doctor: each a function with a stable code, and one place that runs them."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.finding import Finding, Findings, Severity, scope_of
from bnfinetune.errors import SelectionError

Need = Literal["optimizer", "loader", "trace", "process_group", "source", "averaged", "saved", "exported"]

THEMES = {
    "1": "Freezing",
    "2": "Data and batches",
    "3": "Hidden forwards",
    "4": "Several processes",
    "5": "Numerics and optimizer",
    "6": "Averaging, checkpoints, deployment",
}
_MODULES = ("freezing", "stages", "batches", "domains", "forwards", "ranks", "numerics", "averaging", "conversions")


@dataclass(frozen=True)
class Trouble:
    """What a rule reports.

    Attributes:
        where: names of the layers or parameters concerned.
        measured: what was found, in numbers.
        fix: the API call that mends it.
        recipe: the recipe keys that mend it, where keys can.
    """

    where: tuple[str, ...]
    measured: str
    fix: str
    recipe: str = ""


Check = Callable[[Case], Iterable[Trouble]]


@dataclass(frozen=True)
class Rule:
    """One pitfall that the doctor knows.

    Attributes:
        code: stable code; its first digit is the theme.
        title: the pitfall in a few words.
        severity: of its findings.
        why: why it matters, in one sentence.
        needs: what the rule looks at besides the model; it is left out where one of these is missing.
        rewatched: a rule about the set-up that is judged again after watched steps, which may have changed the answer.
        check: yields a `Trouble` for each thing found.
    """

    code: str
    title: str
    severity: Severity
    why: str
    needs: tuple[Need, ...]
    rewatched: bool
    check: Check

    @property
    def theme(self) -> str:
        return THEMES[self.code[2]]

    @property
    def is_dynamic(self) -> bool:
        """Whether the rule judges a few watched steps rather than the set-up alone."""
        return "trace" in self.needs

    @property
    def text(self) -> str:
        """The rule's page: symptom, cause, detection and example, from the function's docstring."""
        return inspect.cleandoc(self.check.__doc__ or "")

    def findings(self, case: Case) -> Iterator[Finding]:
        """What the rule finds in a case that has all it needs."""
        universe = list(case.layers)
        for trouble in self.check(case):
            yield Finding(
                code=self.code,
                severity=self.severity,
                title=self.title,
                where=trouble.where,
                scope=scope_of(trouble.where, universe),
                measured=trouble.measured,
                why=self.why,
                fix=trouble.recipe if case.context.recipe_keys and trouble.recipe else trouble.fix,
            )


_RULES: dict[str, Rule] = {}


def rule(
    code: str,
    title: str,
    severity: Severity,
    *,
    why: str,
    needs: tuple[Need, ...] = (),
    rewatched: bool = False,
) -> Callable[[Check], Check]:
    """Enter a function in the table of rules."""

    def enter(check: Check) -> Check:
        assert code not in _RULES, f"two rules {code}"
        _RULES[code] = Rule(code, title, severity, why, needs, rewatched, check)
        return check

    return enter


@cache
def all_rules() -> dict[str, Rule]:
    """Every rule by code, in order."""
    for module in _MODULES:
        importlib.import_module(f"bnfinetune.diagnose.rules.{module}")
    return dict(sorted(_RULES.items()))


def known_codes(codes: Iterable[str]) -> tuple[str, ...]:
    """The codes themselves.

    Raises:
        SelectionError: one of them names no rule.
    """
    found = (codes,) if isinstance(codes, str) else tuple(codes)
    for code in found:
        if code not in all_rules():
            near = difflib.get_close_matches(code, all_rules(), n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise SelectionError(f"ignore: there is no rule {code!r}{hint} (docs/checks/README.md lists all)")
    return found


def run_rules(case: Case, *, ignore: Iterable[str] = ()) -> Findings:
    """Findings of all rules that a case has the evidence for.

    With a trace these are the rules about watched steps, without one those about the set-up.

    Raises:
        SelectionError: `ignore` names no rule.
    """
    ignored = known_codes(ignore)
    found: list[Finding] = []
    for code, each in all_rules().items():
        due = each.is_dynamic == (case.trace is not None) or each.rewatched
        if due and code not in ignored and case.has(each.needs):
            found += each.findings(case)
    return Findings(found)
