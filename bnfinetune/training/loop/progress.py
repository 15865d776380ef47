"""How far a run has come, how far it has to go, and which of its networks is the best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from bnfinetune.recipe import Recipe

LOWER_IS_BETTER = {"loss", "ece"}
_EVALUATIONS, _MINUTES = 10, 15.0  # of a stream whose recipe says nothing


@dataclass
class Progress:
    """How far a run has come; saved with every state and restored from it."""

    update: int = 0  # optimizer updates done
    epoch: int = 0  # passes over the training split begun before this one
    batch: int = 0  # batches of this epoch already used, per rank
    images: int = 0  # images trained on, over all ranks
    best: float | None = None  # best value of checkpoint.metric
    best_loss: float = math.inf  # validation loss of that network
    best_update: int = 0
    stale: int = 0  # evaluations since the best value
    seconds: float = 0.0  # time spent in updates
    waiting: float = 0.0  # time spent waiting for data
    stopped: bool = False  # by early stopping
    skipped: int = 0  # updates whose loss or gradient was not finite
    skipped_in_row: int = 0  # the last ones of them
    pieces: int = 1  # that micro-batches are cut into, by train.auto_batch

    @property
    def time(self) -> float:
        """Seconds of all updates, with their wait for data."""
        return self.seconds + self.waiting

    @property
    def rate(self) -> float:
        """Images per second, over all ranks."""
        return self.images / self.time if self.time else 0.0

    def take_score(self, metric: str, value: float, loss: float, *, sound: bool = True) -> bool:
        """Whether an evaluation is the best so far; of equal ones, the one of lower loss is.

        Args:
            metric: `checkpoint.metric`, or the task's own.
            value: Its value.
            loss: The validation loss.
            sound: Whether all that the network holds is finite; if not, or if value or loss are not, it never is best.
        """
        score = score_of(metric, value, loss) if sound else None
        best = None if self.best is None else score_of(metric, self.best, self.best_loss)
        better = score is not None and (best is None or score > best)
        higher = score is not None and (best is None or score.value > best.value)
        if better:
            self.best, self.best_loss, self.best_update = value, loss, self.update
        self.stale = 0 if higher else self.stale + 1
        return better


class Score(NamedTuple):
    """How good a network is; the better of two is the larger.

    Attributes:
        value: Of the metric that chooses, such that more is better.
        minus_loss: The negative validation loss, which decides between equal values.
    """

    value: float
    minus_loss: float


def score_of(metric: str, value: float, loss: float) -> Score | None:
    """The score of an evaluation; None where a number is not finite, which never is the best."""
    if not (math.isfinite(value) and math.isfinite(loss)):
        return None
    return Score(-value if metric in LOWER_IS_BETTER else value, -loss)


class Status(NamedTuple):
    """The last update.

    Attributes:
        loss: The training loss over all ranks; None where it was not finite, NaN where none is known yet.
        lr: The largest learning rate.
        images_per_second: Over all ranks and the run so far.
    """

    loss: float | None
    lr: float
    images_per_second: float

    def __str__(self) -> str:
        loss = "not finite" if self.loss is None else "not known yet" if math.isnan(self.loss) else f"{self.loss:.3f}"
        return f"loss {loss}  lr {self.lr:.2g}  {self.images_per_second:.0f} images/s"


class Rhythm(NamedTuple):
    """When a run pauses by itself, besides the ends of its epochs.

    Attributes:
        evaluate_every: Updates between evaluations; None for epochs.
        minutes: Between two saves; None for no clock.
        by_itself: Whether nobody asked for it: a stream has no epochs.
    """

    evaluate_every: int | None
    minutes: float | None
    by_itself: bool = False


def rhythm_of(recipe: Recipe, updates: int) -> Rhythm:
    """The rhythm of a recipe; a stream without one is evaluated ten times, and saved by the clock besides."""
    every, minutes = recipe.evaluate.every_steps, recipe.checkpoint.every_minutes
    if not recipe.data.streaming or every is not None:
        return Rhythm(every, minutes)
    return Rhythm(max(math.ceil(updates / _EVALUATIONS), 1), minutes or _MINUTES, by_itself=True)


def total_updates(recipe: Recipe, batches: int | None) -> int:
    """Optimizer updates of the whole run; `batches` per epoch and rank is None for a stream."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert batches is not None  # the recipe schema asks streams for train.steps
    return recipe.train.epochs * math.ceil(batches / recipe.train.grad_accum)
