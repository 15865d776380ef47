"""Says how many timm families the conformance suite has covered."""

from tests.bn.families import FAMILIES

_TEST = "test_every_policy_keeps_its_promises["


def pytest_terminal_summary(terminalreporter):
    counts = {
        outcome: sum(_TEST in report.nodeid for report in terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "skipped")
    }
    if any(counts.values()):
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        terminalreporter.write_line(f"policies on timm families with BN: {said}, of {len(FAMILIES)} families")
