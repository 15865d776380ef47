"""Findings in SARIF 2.1.0 (OASIS), which code hosts and editors show beside the code."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

from bnfinetune.diagnose.finding import Finding, Severity

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}


def as_sarif(findings: Sequence[Finding], file: str) -> str:
    """A SARIF log of one run, as text.

    Layers are logical locations; as hosts place a result in a file, each stands at the first line of `file`.

    Args:
        findings: What `check_bn`, `watch_bn` or a recipe's check found.
        file: What was judged, such as the recipe's path relative to the repository.
    """
    rules = {found.code: found for found in reversed(findings)}
    driver = {
        "name": "bnfinetune",
        "version": importlib.metadata.version("bnfinetune"),
        "rules": [_rule(rules[code]) for code in sorted(rules)],
    }
    results = [_result(found, sorted(rules).index(found.code), file) for found in findings]
    log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    return json.dumps(log, indent=2)


def _rule(found: Finding) -> dict[str, Any]:
    return {
        "id": found.code,
        "shortDescription": {"text": found.title},
        "fullDescription": {"text": found.why},
        "help": {"text": f"see {found.page}"},
        "defaultConfiguration": {"level": _LEVELS[found.severity]},
    }


def _result(found: Finding, rule: int, file: str) -> dict[str, Any]:
    message = f"{found.title}; {found.measured}. Fix: {found.fix}"
    place: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": file}, "region": {"startLine": 1}}}
    if found.where:
        place["logicalLocations"] = [{"fullyQualifiedName": name or ".", "kind": "module"} for name in found.where]
    return {
        "ruleId": found.code,
        "ruleIndex": rule,
        "level": _LEVELS[found.severity],
        "message": {"text": message},
        "locations": [place],
        "partialFingerprints": {"bnfinetune/v1": f"{found.code} {found.scope}"},
    }
