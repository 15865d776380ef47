"""Random draws as pure functions of what they are drawn for.

An augmentation depends on (seed, epoch, index) alone: not on the number of workers or ranks, nor on where a run was
resumed. timm's transforms draw from Python's, NumPy's and torch's global generators, so these are seeded anew for
every sample and given back as they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from struct import pack

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part and on their order, alike on all machines."""
    digest = blake2b(pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_draws(seed: int) -> None:
    """Seed the CPU generators of Python, NumPy and torch; the GPU's are left alone (augmentation does not use them)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # the legacy generator, which timm draws from
    torch.default_generator.manual_seed(seed)


@contextmanager
def preserved_draws() -> Iterator[None]:
    """Give the generators of Python, NumPy and torch their state back, whatever happens."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
