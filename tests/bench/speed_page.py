"""Writes docs/benchmarks.md and has its plot drawn, from the figures in docs/benchmarks/*.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tests.bench.frozen_bn import FOLDED, FROZEN, OTHERWISE, VARIANTS, is_frozen
from tests.bench.pages import DOCS, draw_plots
from tests.bench.results import recorded

PAGE = DOCS / "benchmarks.md"
PLOT = "images/frozen_bn.svg"
PLOT_SAYS = (
    "Bars from zero: time of a training step over that of the same network without norm, for each network and way to "
    "freeze; folding comes nearest to 1"
)

INTRODUCTION = """\
# Benchmarks

<!-- Written by python -m tests.bench speed_page from docs/benchmarks/*.json. -->

Every figure is a ratio of medians over alternating runs in one process, in an order drawn anew for each round, so that
whatever else the machine does slows all candidates alike; "half of the runs" is the middle half of the ratios of
single rounds. Of steps and of the loop, on a CPU with one thread, it is the process's own time that counts, and freed
memory stays with the process, as with a caching allocator: otherwise the kernel's handing out of the same pages adds
up to a tenth, now to one candidate and now to another. Probes, runs and ranks are timed by the clock. Bytes are exact.
`python -m tests.bench NAME --record` measures again, `python -m tests.bench speed_page` writes this page.
"""

STEP = """\
## What frozen BN costs in a training step

A step is forward, backward and a gradient for every parameter that trains, against the same network without any norm
layer. *folded* is `fold_bn(freeze_bn(model, affine=False))`: statistics fixed, weight and bias learn; *folded, affine
frozen* is `fold_bn(freeze_bn(model))`. timm's and torchvision's layers always freeze the affine. Every candidate but
the first two puts out the same numbers to 1e-3, or is left out. *kept* counts the bytes that autograd keeps for
backward besides parameters and buffers; *peak* is the most that a step has allocated at once, gradients included.
"""

LEADS = """\
Folding against the fastest rival that trains the same parameters: the median of the rounds' ratios, and in brackets its
95 % confidence interval. Below 1, folding is faster; where the interval holds 1, the two cannot be told apart here.
"""

BEST = """\
In bold, the fastest of the candidates whose weight and bias learn, and of those that freeze them too. The more of a
network's time goes into activations, as in those of depthwise convolutions, the more folding saves. In `resnet18`,
where convolutions are nearly all of it, there is little to save, and in `densenet121` only the layers behind a
convolution fold.
"""

FAMILIES = """\
## Which layers fold

Pairs of a convolution and a BN layer are found by what flows, whatever the network; `fold_report(model)`
lists them for any. For one network of each timm family with BN, outputs and gradients were compared with those of BN in
evaluation mode: the largest difference of any output or gradient, relative to its largest value.
"""


def main(arguments: Sequence[str]) -> None:
    parts = [INTRODUCTION, *_frozen(), *_others(), *_families()]
    PAGE.write_text("\n".join(part.rstrip() + "\n" for part in parts), encoding="utf-8")
    draw_plots()
    print(f"wrote {PAGE}")


def _frozen() -> Iterable[str]:
    results = recorded("frozen_bn")
    if not results:
        return
    yield STEP
    places = list(dict.fromkeys(map(_place, results)))
    for place in places:
        here = {key.removesuffix(f" on {place}"): result for key, result in results.items() if _place(key) == place}
        yield f"### All networks, on {place}"
        yield _table(("", *here), _ratios(here))
        if place == places[0]:
            yield BEST
        yield LEADS if place == places[0] else "Against the fastest rival:"
        yield _table(("", *here), _leads(here))
    yield f"![{PLOT_SAYS}]({PLOT})"
    for key, result in results.items():
        yield from _one_network(key, result)


def _place(key: str) -> str:
    """What a network was measured on."""
    return key.partition(" on ")[2]


def _one_network(key: str, result: dict[str, Any]) -> Iterable[str]:
    yield f"### {key}"
    yield (
        f"Batches of {result['batch']} images of {result['size']} x {result['size']}, {result['rounds']} rounds; "
        f"{result['folded']} of {result['layers']} BN layers folded; weights {_mib(result['weights'])} MiB."
    )
    header = ("", "time", "half of the runs", "ms", "kept, MiB", "peak, MiB")
    yield _table(
        header,
        (
            (
                row["name"],
                f"{row['ratio']:.3f}",
                "{:.3f}-{:.3f}".format(*row["spread"]),
                f"{row['median'] * 1e3:.0f}",
                *(_mib(row["kept"]), _mib(row["peak"])),
            )
            for row in result["rows"]
        ),
    )
    yield from (f"Left out: {name} ({reason})." for name, reason in result["left_out"].items())
    yield _setting(result)


def _leads(results: dict[str, dict[str, Any]]) -> Iterable[list[str]]:
    """A row per kind of folding, a column per network."""
    for name in (FOLDED, FOLDED + FROZEN):
        found = [result["leads"][name] for result in results.values()]
        shown = [
            f"{each['ratio']:.3f} ({each['low']:.3f}-{each['high']:.3f}), {each['rival'].removesuffix(FROZEN)}"
            for each in found
        ]
        yield [name, *shown]


def _ratios(results: dict[str, dict[str, Any]]) -> Iterable[list[str]]:
    """A row per candidate, a column per network, the fastest of each kind in bold."""
    times = {key: {row["name"]: row["ratio"] for row in result["rows"]} for key, result in results.items()}
    for name in VARIANTS:
        cells = []
        for found in times.values():
            rivals = [
                time for other, time in found.items() if other not in OTHERWISE and is_frozen(other) == is_frozen(name)
            ]
            best = name not in OTHERWISE and found.get(name) == min(rivals)
            cells.append("-" if name not in found else f"**{found[name]:.3f}**" if best else f"{found[name]:.3f}")
        yield [name, *cells]


TITLES = {
    "linear_probe": "A linear probe on features computed once",
    "whole_run": "Whole runs beside timm's train.py",
    "run_time": "Where a run's time goes",
    "memory_format": "From which size of images on channels_last saves time on a CPU",
    "loop_overhead": "What the loop adds to a bare PyTorch loop",
    "two_ranks": "Two processes against one",
    "fold_worth": "From which size of batches on folding saves time",
}


def _others() -> Iterable[str]:
    for bench, title in TITLES.items():
        for number, (key, result) in enumerate(recorded(bench).items()):
            if number == 0:
                yield f"## {title}"
            yield key + "."
            columns = [name for name in result["rows"][0] if name != "name"]
            rows = ([row["name"], *(_shown(name, row[name]) for name in columns)] for row in result["rows"])
            yield _table(["", *(_HEADERS.get(name, name.replace("_", " ")) for name in columns)], rows)
            yield _setting(result)


_HEADERS = {"median": "s", "ratio": "time", "spread": "half of the runs", "top1": "top-1"}


def _shown(name: str, value: Any) -> str:
    if isinstance(value, list):
        return "-".join(f"{part:.3f}" for part in value)
    if name == "top1" or name == "share":
        return f"{value:.1%}"
    if name == "ratio":
        return f"{value:.3f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _families() -> Iterable[str]:
    results = recorded("fold_families")
    if not results:
        return
    yield FAMILIES
    rows = [
        (name, f"{row['folded']} of {row['layers']}", *(f"{row[key]:.0e}" for key in ("double", "single", "plain")))
        for name, row in sorted(results.items())
    ]
    yield _table(("network", "folded", "float64", "float32", "float32, evaluation mode"), rows)
    yield _setting(next(iter(results.values())))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _setting(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['machine']}; {versions}; {result['date']}."
