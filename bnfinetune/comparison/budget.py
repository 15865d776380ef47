"""How much a comparison may cost. No torch, so that mistakes answer at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

from bnfinetune.errors import RecipeError

Unit = Literal["minutes", "updates", "images"]


class Budget(NamedTuple):
    """What all runs together may take before no new round of seeds begins.

    Attributes:
        amount: How much.
        unit: Of what: minutes of training, optimizer updates, or images trained on.
    """

    amount: float
    unit: Unit

    @classmethod
    def of(cls, text: str) -> Budget:
        """From words such as `30 minutes`.

        Raises:
            RecipeError: They are no such words.
        """
        amount, _, unit = text.strip().partition(" ")
        try:
            number = float(amount)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf or unit not in get_args(Unit):
            raise RecipeError(f"budget: found {text!r}; allowed: '30 minutes', '2000 updates' or '50000 images'")
        return cls(number, cast("Unit", unit))

    def is_spent(self, runs: Iterable[Mapping[str, Any]]) -> bool:
        """Whether so much was used by finished runs, by the numbers of their summaries."""
        key = "seconds" if self.unit == "minutes" else self.unit
        used = sum(float(run[key]) for run in runs)
        return used >= self.amount * (60 if self.unit == "minutes" else 1)

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"
