"""The rules of the doctor: each a function with a stable code, and one place that runs them."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from bnfinetune.diagnose.case import Case, expected_of
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


@dataclass(frozen=True)
class Lacking:
    """What a rule reports that had nothing, or too little, to judge by.

    Attributes:
        what: what was lacking, as in "no evaluation batch".
    """

    what: str


Check = Callable[[Case], Iterable[Trouble | Lacking]]

_WITHOUT: dict[Need, str] = {
    "optimizer": "no optimizer",
    "loader": "no training loader",
    "trace": "no watched steps",
    "process_group": "no process group",
    "source": "no model from before a conversion",
    "averaged": "no averaged model",
    "saved": "no saved state",
    "exported": "no exported graph",
}


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
        check: yields a `Trouble` for each thing found, or what was `Lacking`.
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

    def lacks(self, case: Case) -> str | None:
        """What the rule needs and was not given; None if nothing."""
        lacking = [need for need in self.needs if not case.has([need])]
        return ", ".join(_WITHOUT[need] for need in lacking) or None

    def can_apply(self, case: Case) -> bool:
        """Whether there could be anything to find: ranks of one process agree, and recipes bring sound parts along."""
        if "process_group" in self.needs and case.ranks == 1:
            return False
        return not case.context.recipe_keys

    def findings(self, case: Case) -> Iterator[Finding | Lacking]:
        """What the rule finds in a case that has all it needs, or what it lacks."""
        case = case.without(name for name, layer in case.every_layer.items() if self.code in expected_of(layer))
        if case.passed_over and not case.layers:
            return
        universe = list(case.every_layer)
        for trouble in self.check(case):
            if isinstance(trouble, Lacking):
                yield trouble
                continue
            if trouble.where and case.passed_over.issuperset(trouble.where):
                continue
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


def known_codes(codes: Iterable[str], *, argument: str = "ignore") -> tuple[str, ...]:
    """The codes themselves, given as an argument of this name.

    Raises:
        SelectionError: one of them names no rule.
    """
    found = (codes,) if isinstance(codes, str) else tuple(codes)
    for code in found:
        if code not in all_rules():
            near = difflib.get_close_matches(code, all_rules(), n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise SelectionError(f"{argument}: there is no rule {code!r}{hint} (docs/checks/README.md lists all)")
    return found


def run_rules(case: Case, *, ignore: Iterable[str] = ()) -> Findings:
    """Findings of all rules that a case has the evidence for, and what the others lack.

    With a trace these are the rules about watched steps, without one those about the set-up. What layers do on purpose,
    as `expect` says, is left out.

    Raises:
        SelectionError: `ignore` names no rule.
    """
    ignored = known_codes(ignore)
    found: list[Finding] = []
    unjudged: dict[str, str] = {}
    for code, each in all_rules().items():
        due = each.is_dynamic == (case.trace is not None) or each.rewatched
        if not due or code in ignored:
            continue
        lacking = each.lacks(case)
        if lacking is not None:
            unjudged |= {code: lacking} if each.can_apply(case) else {}
            continue
        said = list(each.findings(case))
        found += [one for one in said if isinstance(one, Finding)]
        unjudged.update((code, one.what) for one in said if isinstance(one, Lacking))
        if not said and each.is_dynamic and case.trace is not None and not case.trace.trained:
            unjudged[code] = "no training step"
    return Findings(found, unjudged)
