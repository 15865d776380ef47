"""Times things against each other, in alternation, so that a busy machine slows all of them alike.

With one thread on the CPU the clock counts this process's own CPU time, which others on the machine disturb less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """One candidate's runs.

    Attributes:
        name: what ran.
        median: seconds per run.
        ratio: its median over the baseline's median.
        spread: the middle half of the ratios of single rounds, lower and upper quartile.
    """

    name: str
    median: float
    ratio: float
    spread: tuple[float, float]


def compare(
    candidates: Mapping[str, Callable[[], object]], *, baseline: str, rounds: int = 30, warmup: int = 3
) -> list[Timing]:
    """Runs every candidate once per round, in an order that rotates from round to round.

    Args:
        candidates: what to run, by name.
        baseline: the name that ratios refer to.
        rounds: measured rounds.
        warmup: rounds before those.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = _time(candidates[name])
            if number >= 0:
                seconds[name].append(elapsed)
    base = seconds[baseline]
    return [_timing(name, seconds[name], base) for name in names]


def _timing(name: str, own: list[float], base: list[float]) -> Timing:
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Timing(name, statistics.median(own), statistics.median(own) / statistics.median(base), (low, high))


def _time(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        clock, wait = time.perf_counter, torch.cuda.synchronize
    else:
        clock, wait = time.process_time if torch.get_num_threads() == 1 else time.perf_counter, int
    wait()
    start = clock()
    run()
    wait()
    return clock() - start


def table(title: str, timings: list[Timing]) -> str:
    """The timings as text, ratios first."""
    width = max(len(timing.name) for timing in timings)
    lines = [title, f"  {'':{width}}  ratio   middle half     ms"]
    lines += [
        f"  {t.name:{width}}  {t.ratio:5.3f}   {t.spread[0]:5.3f}-{t.spread[1]:5.3f}   {t.median * 1e3:7.2f}"
        for t in timings
    ]
    return "\n".join(lines)
