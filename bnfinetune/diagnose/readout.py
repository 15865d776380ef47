"""What statistics of new images would be worth to a new head, measured on the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Readout(NamedTuple):
    """How well features tell the classes apart, each image predicted by ridge regression on all others.

    Attributes:
        images: how many.
        scores: by the weight of the images' own statistics (0 the stored ones, 1 re-estimated, between them mixtures):
            the share of images whose class is right; of several labels per image, the explained share of the variance.
        best: the weight whose error is the least.
        gain: its score above that of the stored statistics.
        doubt: standard error of the gain, paired over images.
        sureness: by how many standard errors, paired over images, its squared error is less. An image counts by a
            number there, not as right or wrong, so that fewer images tell.
    """

    images: int
    scores: dict[float, float]
    best: float
    gain: float
    doubt: float
    sureness: float

    @property
    def helps(self) -> bool:
        """Whether the images' own statistics are better by more than chance: two standard errors of the error."""
        return self.gain > 0 and self.sureness > 2

    @property
    def answer(self) -> str:
        """Whether to compute statistics anew, in a few words."""
        if self.helps:
            return f"help, best {_named(self.best)}"
        return "may or may not help" if self.gain > 0 else "would not help"

    @property
    def verdict(self) -> str:
        """The answer in a sentence, with what it rests on."""
        numbers = ", ".join(f"{score:.1%} {_named(share)}" for share, score in self.scores.items())
        found = f"a linear readout of the features has {numbers} ({self.images} images, each predicted by the others)."
        return f"Statistics of these images {self.answer}: {found}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers; weights as strings."""
        scores = {f"{share:g}": score for share, score in self.scores.items()}
        return self._asdict() | {"scores": scores, "helps": self.helps}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Readout:
        """What `to_dict` has given."""
        scores = {float(share): score for share, score in told["scores"].items()}
        return cls(**{key: told[key] for key in cls._fields} | {"scores": scores})


def _named(share: float) -> str:
    return {0.0: "as stored", 1.0: "re-estimated"}.get(share, f"with {share:.0%} of theirs")
