"""The tables of the bench, from what is recorded in docs/benchmarks/transfer.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

from scipy.stats import ttest_1samp

from tests.bench.results import recorded

Scores = dict[str, dict[str, dict[str, float]]]
"""Top-1 in percent by place, way and seed."""

ADVISED, ADVISED_OF_FEW = "precise_then_freeze", "lp_ft"
"""What `recommend` says of such sets, which all else is compared with."""

_ENOUGH = 6  # pairs


def measured(batch: int, what: str) -> Scores:
    """All results for one batch size: `top1` on test images, or the `seconds` that a run took."""
    return {
        place: {way: {seed: run[what] for seed, run in sorted(runs.items())} for way, runs in found["ways"].items()}
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
    parts = [_part(f"Batches of {batch}", batch, ways, ADVISED) for batch in batches]
    return "\n\n".join(filter(None, [*parts, _part("Few training images", batches[0], few, ADVISED_OF_FEW)]))


def _part(title: str, batch: int, ways: Sequence[str], advised: str) -> str:
    everything, seconds = measured(batch, "top1"), measured(batch, "seconds")
    found = {place: {way: runs[way] for way in ways if way in runs} for place, runs in everything.items()}
    found = {place: runs for place, runs in found.items() if runs}
    known = [way for way in ways if any(way in runs for runs in found.values())]
    if not known:
        return ""
    reference = next(way for way in known if way.split()[0] == advised)
    places = [place.rpartition(", ")[0] for place in found]
    head = ["way", *places, f"against {advised}", "regret, mean", "worst", "time"]

    def row(way: str) -> list[str]:
        told = [*_compared(found, way, reference), *_regret(found, way), _time(seconds, way, reference)]
        return [f"`{way}`", *_cells(found, way), *told]

    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *map(row, known))]
    return "\n".join([f"### {title}", "", *lines])


def _cells(found: Scores, way: str) -> Iterator[str]:
    for runs in found.values():
        values = list(runs.get(way, {}).values())
        spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
        yield f"{mean(values):.1f}{spread}" if values else "-"


def _compared(found: Scores, way: str, reference: str) -> list[str]:
    """The mean difference to the reference over tasks, backbones and seeds, with its 95 % confidence interval.

    Of a handful of pairs, an interval would say nothing.
    """
    differences = list(_differences(found, way, reference))
    if way == reference or not differences:
        return ["-"]
    if len(differences) < _ENOUGH:
        return [f"{mean(differences):+.1f} (of {len(differences)})"]
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


def _time(seconds: Scores, way: str, reference: str) -> str:
    """Of a run, over that of the reference in the same place under the same seed: the mean ratio."""
    ratios = [
        runs[way][seed] / runs[reference][seed]
        for runs in seconds.values()
        for seed in runs.get(way, {}).keys() & runs.get(reference, {}).keys()
    ]
    return f"{mean(ratios):.1f}" if ratios else "-"


def _mean(runs: Mapping[str, float]) -> float:
    return mean(runs.values())
