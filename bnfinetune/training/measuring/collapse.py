"""Notices a network that gives every image the same answer: no error is raised, and the loss alone looks harmless."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bnfinetune.recipe import Recipe
from bnfinetune.training.measuring.metrics import ClassMetrics, Metrics

_NEARLY = 0.05  # of a class's images
_EARLY = 50  # updates


class CollapseWatch:
    """Looks at one evaluation after the other, and speaks once.

    Before 50 updates it proves nothing: early in training a sound network may prefer one class.

    Args:
        recipe: What is trained, with its settled learning rate.
        names: The classes' names.
    """

    def __init__(self, recipe: Recipe, names: Sequence[str]) -> None:
        self._recipe, self._names = recipe, names
        self._told = False

    def look(self, metrics: Metrics, update: int, train_loss: float | None) -> str | None:
        """What is to be said about an evaluation, if anything.

        Args:
            metrics: Of the validation images.
            update: How many have been made.
            train_loss: Mean training loss since the evaluation before.
        """
        answer = only_answer(metrics)
        if answer is None or update < _EARLY or self._told:
            return None
        self._told = True
        return f"all validation images are called {self._names[answer]}: {self._cause(train_loss)}"

    def _cause(self, train_loss: float | None) -> str:
        """Why, and what to do: what learns well in training fails by its statistics, what does not by its updates."""
        if train_loss is not None and train_loss < math.log(len(self._names)) / 2:
            return (
                f"the training loss is {train_loss:.2f}, so it is how the network is evaluated: its running statistics "
                "do not fit; try recalibrate.at=[eval]"
            )
        rate = float(self._recipe.optim.lr)
        return f"the network has collapsed; updates are too long for it: try optim.lr={rate / 3:.1g}"


def only_answer(metrics: Metrics) -> int | None:
    """The class that nearly every image is taken for, although not nearly every image is of it; None if there is none.

    Read off the accuracy of each class, which is known for any number of classes: that of one is nearly 1, that of all
    others nearly 0.
    """
    if not isinstance(metrics, ClassMetrics) or len(metrics.per_class) < 2 or metrics.top1 >= 1 - _NEARLY:
        return None
    first, *others = sorted(((value or 0.0, number) for number, value in enumerate(metrics.per_class)), reverse=True)
    return first[1] if first[0] >= 1 - _NEARLY and others[0][0] <= _NEARLY else None
