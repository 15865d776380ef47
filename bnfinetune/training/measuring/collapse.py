"""Notices a network that gives every image the same answer: no error is raised, and the loss alone looks harmless."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bnfinetune.recipe import Recipe
from bnfinetune.training.measuring.metrics import ClassMetrics, Metrics
from bnfinetune.training.network.optim import rate_of

_NEARLY = 0.95  # of all images
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
        return f"all validation images are called {self._names[answer]}: {self._cause(metrics, train_loss)}"

    def _cause(self, metrics: Metrics, train_loss: float | None) -> str:
        """Why, and what to do: what learns well in training fails by its statistics, what does not by its updates."""
        live = any(section.train_stats != "running" for section in self._recipe.bn_sections)
        if live and train_loss is not None and train_loss < _entropy(metrics) / 2:
            return (
                f"the training loss is {train_loss:.2f}, so it is how the network is evaluated: its running statistics "
                "do not fit; try recalibrate.at=[eval]"
            )
        shorter = rate_of(self._recipe.optim) / 3
        return f"the network has collapsed; updates are too long for it: try optim.lr={shorter:.1g}"


def only_answer(metrics: Metrics) -> int | None:
    """The class that nearly every image is taken for, although not nearly every image is of it; None if there is none.

    It takes a confusion matrix, and so is None beyond `MOST_CLASSES` classes.
    """
    if not isinstance(metrics, ClassMetrics) or not metrics.confusion or metrics.top1 >= _NEARLY:
        return None
    answers = [sum(column) for column in zip(*metrics.confusion, strict=True)]
    return answers.index(max(answers)) if max(answers) >= _NEARLY * metrics.images else None


def _entropy(metrics: Metrics) -> float:
    """The cross-entropy of always answering with the shares of the classes, in nats."""
    shares = [sum(row) / metrics.images for row in metrics.confusion]
    return -sum(share * math.log(share) for share in shares if share)
