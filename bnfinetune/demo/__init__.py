"""The embedded default: a backbone that loads without a download, and two sets of images to try it on.

Importing this package registers `bnf_resnet` with timm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnfinetune.demo.backbone import bnf_resnet

if TYPE_CHECKING:
    from bnfinetune.demo.characters import load_characters
    from bnfinetune.demo.digits import load_digits, load_domains

__all__ = ["bnf_resnet", "load_characters", "load_digits", "load_domains"]


def __getattr__(name: str) -> Any:
    """Import a data set's module on first use: neither it nor what it needs is worth a wait for the backbone alone."""
    if name == "load_characters":
        from bnfinetune.demo.characters import load_characters

        return load_characters
    if name in ("load_digits", "load_domains"):
        from bnfinetune.demo import digits

        return getattr(digits, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
