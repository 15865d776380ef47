"""The tables of the bench, from what is recorded in docs/benchmarks/transfer.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

from scipy.stats import ttest_1samp

from tests.bench.results import recorded

Scores = dict[str, dict[str, dict[str, float]]]
"""Top-1 in percent by place, way and seed."""

REFERENCE = "freeze_bn"


def scores(batch: int) -> Scores:
    """All results for one batch size."""
    return {
        place: {way: {seed: run["top1"] for seed, run in sorted(runs.items())} for way, runs in found["ways"].items()}
        for place, found in recorded("transfer").items()
        if place.endswith(f"batches of {batch}")
    }


def tables(batches: Sequence[int], ways: Sequence[str], few: Sequence[str]) -> str:
    """Markdown, a table for each batch size: means of the seeds and, in brackets, the lowest and highest.

    Args:
        batches: images per update.
        ways: those that are compared with each other.
        few: others, with fewer training images, likewise; at the first batch size.
    """
    parts = [_part(f"Batches of {batch}", scores(batch), ways) for batch in batches]
    return "\n\n".join(filter(None, [*parts, _part("Few training images", scores(batches[0]), few)]))


def _part(title: str, everything: Scores, ways: Sequence[str]) -> str:
    found = {place: {way: runs[way] for way in ways if way in runs} for place, runs in everything.items()}
    found = {place: runs for place, runs in found.items() if runs}
    known = [way for way in ways if any(way in runs for runs in found.values())]
    if not known:
        return ""
    reference = next(way for way in known if way.split()[0] == REFERENCE)
    head = ["way", *(place.rpartition(", ")[0] for place in found), f"against {REFERENCE}", "regret, mean", "worst"]
    rows = [[f"`{way}`", *_cells(found, way), *_compared(found, way, reference), *_regret(found, way)] for way in known]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join([f"### {title}", "", *lines])


def _cells(found: Scores, way: str) -> Iterator[str]:
    for runs in found.values():
        values = list(runs.get(way, {}).values())
        yield f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else "-"


def _compared(found: Scores, way: str, reference: str) -> list[str]:
    """The mean difference to the reference over tasks, backbones and seeds, with its 95 % confidence interval."""
    differences = list(_differences(found, way, reference))
    if way == reference or len(differences) < 2:
        return ["-"]
    low, high = ttest_1samp(differences, 0.0).confidence_interval()
    return [f"{mean(differences):+.1f} ({low:+.1f} to {high:+.1f})"]


def _differences(found: Scores, way: str, other: str) -> Iterator[float]:
    for runs in found.values():
        both = runs.get(way, {}).keys() & runs.get(other, {}).keys()
        yield from (runs[way][seed] - runs[other][seed] for seed in sorted(both))


def _regret(found: Scores, way: str) -> list[str]:
    """How far a way stays behind the best recipe of each task and backbone, in the mean over seeds."""
    behind = [max(map(_mean, runs.values())) - _mean(runs[way]) for runs in found.values() if way in runs]
    missing = len(found) - len(behind)
    return [f"{mean(behind):.1f}{f' (of {len(behind)})' if missing else ''}", f"{max(behind):.1f}"]


def _mean(runs: Mapping[str, float]) -> float:
    return mean(runs.values())
