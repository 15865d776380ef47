"""How likely a difference is that chance alone makes."""

from __future__ import annotations

import math


def chance_beyond(t: float, freedom: int) -> float:
    """Probability that Student's t with so many degrees of freedom is farther from 0 than `t`, on either side.

    The finite sums of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.

    Raises:
        ValueError: `freedom` is less than 1.
    """
    if freedom < 1:
        raise ValueError(f"freedom={freedom}: Student's t has at least one degree of freedom")
    angle = math.atan2(abs(t), math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for step in range(2 + odd, freedom - 1, 2):
        term *= (step - 1) / step * cosine**2
        total += term
    within = (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
    return max(1.0 - within, 0.0)
