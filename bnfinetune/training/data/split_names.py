"""Which names mean a split: `train`, `Valid`, `TEST`, `training_set`, `test2017`, whoever wrote them."""

from __future__ import annotations

import re
from typing import Final, Literal

Role = Literal["train", "val", "test"]

_WORDS: Final[dict[str, Role]] = {
    **dict.fromkeys(("train", "training", "trn", "trainset", "traindata"), "train"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "valset", "dev", "devset", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "testset", "testdata"), "test"),
}
_FILLERS: Final = frozenset(
    ("set", "sets", "data", "dataset", "split", "folder", "images", "image", "imgs", "img", "pictures", "photos", "of")
)
_WORD: Final = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def split_role(name: str) -> Role | None:
    """What a name is for if it says nothing but that, give or take `set`, `images`, numbers and the like."""
    words = _words(name)
    roles = {_WORDS[word] for word in words if word in _WORDS}
    return roles.pop() if len(roles) == 1 and words <= _FILLERS | set(_WORDS) else None


def split_word(name: str) -> Role | None:
    """The one role that a name speaks of among other words, as `seg_train` and `flowers-test-00001` do."""
    roles = {_WORDS[word] for word in _words(name) if word in _WORDS}
    return roles.pop() if len(roles) == 1 else None


def _words(name: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(name)} if name.isascii() else {name.casefold()}
