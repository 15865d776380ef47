"""What the embedded backbone was taught: its classes and the size of its images."""

from __future__ import annotations

import string
from typing import Final

IMAGE_SIZE: Final = 32
"""Side of a rendered image, in pixels."""

AMBIGUOUS: Final = "OoIl"
"""Letters that are no class: without context and at a random size nobody can tell them from 0, 1 or one another."""

SAME_SHAPE: Final = "CKPSUVWXZ"
"""Letters whose two cases differ in size only. A random size hides that, so one class holds both."""

CLASSES: Final = tuple(
    char
    for char in string.digits + string.ascii_uppercase + string.ascii_lowercase
    if char not in AMBIGUOUS and char.upper() + char not in {letter + letter.lower() for letter in SAME_SHAPE}
)
"""The 49 class names: the ten digits first, then capitals, then small letters."""
