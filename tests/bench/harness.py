"""Times things against each other, in alternation, so that a busy machine slows all of them alike.

With one thread on the CPU the clock counts this process's own CPU time, which others on the machine disturb less; on a
CUDA device its own events count. Memory that is freed stays with the process: otherwise the kernel fills the same pages
with zeros again and again, and how many depends on who ran before.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from scipy.stats import quantile_test

from bnfinetune.training.launch import keep_freed_memory


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


class Lead(NamedTuple):
    """One candidate's time over another's, round by round.

    Attributes:
        rival: the other.
        ratio: the median of the rounds' ratios, below 1 where the candidate is faster.
        low: lower end of the ratio's 95 % confidence interval, from order statistics.
        high: its upper end.
    """

    rival: str
    ratio: float
    low: float
    high: float


def step_device() -> torch.device:
    """Where steps are timed: the accelerator, else the CPU, from now on with one thread."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


def run_in_turn(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of every candidate, once per round, in an order drawn anew for each round.

    Args:
        candidates: what to run, by name.
        rounds: measured rounds.
        warmup: rounds before those.
    """
    keep_freed_memory()
    order, draw = list(candidates), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for number in range(-warmup, rounds):
        draw.shuffle(order)
        for name in order:
            elapsed = _time(candidates[name])
            if number >= 0:
                seconds[name].append(elapsed)
    return seconds


def timings_of(seconds: Mapping[str, list[float]], baseline: str) -> list[Timing]:
    """What `run_in_turn` found, against one of the candidates."""
    return [_timing(name, own, seconds[baseline]) for name, own in seconds.items()]


def compare(
    candidates: Mapping[str, Callable[[], object]], *, baseline: str, rounds: int = 30, warmup: int = 3
) -> list[Timing]:
    """`run_in_turn`, summed up against one of the candidates."""
    return timings_of(run_in_turn(candidates, rounds=rounds, warmup=warmup), baseline)


def lead(seconds: Mapping[str, list[float]], name: str, rival: str) -> Lead:
    """How one candidate does against another; needs six rounds or more for an interval."""
    ratios = [own / other for own, other in zip(seconds[name], seconds[rival], strict=True)]
    interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return Lead(rival, statistics.median(ratios), float(interval.low), float(interval.high))


def _timing(name: str, own: list[float], base: list[float]) -> Timing:
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Timing(name, statistics.median(own), statistics.median(own) / statistics.median(base), (low, high))


def _time(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


def table(title: str, timings: list[Timing]) -> str:
    """The timings as text, ratios first."""
    width = max(len(timing.name) for timing in timings)
    lines = [title, f"  {'':{width}}  ratio   middle half     ms"]
    lines += [
        f"  {t.name:{width}}  {t.ratio:5.3f}   {t.spread[0]:5.3f}-{t.spread[1]:5.3f}   {t.median * 1e3:7.2f}"
        for t in timings
    ]
    return "\n".join(lines)
