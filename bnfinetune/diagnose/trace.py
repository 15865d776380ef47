"""What was seen of a model while some steps of a loop ran."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor

from bnfinetune.diagnose.compare import LayerDrift

MOST_FORWARDS = 4096


@dataclass
class LayerCalls:
    """How one BN layer was called.

    Attributes:
        was_apart: it has stood in evaluation mode while the model trained.
        unfrozen: updates of its statistics after that.
        updating: forwards with gradients that updated its statistics.
        silent: forwards without gradients that did.
        recomputed: recomputations in backward that did.
        normalised: forwards with gradients in training mode, updating or not.
    """

    was_apart: bool = False
    unfrozen: int = 0
    updating: int = 0
    silent: int = 0
    recomputed: int = 0
    normalised: int = 0


@dataclass
class Forward:
    """One forward of the whole model.

    Attributes:
        step: optimizer updates done before it.
        training: mode of the model.
        grad: whether gradients were recorded.
        size: height of the images, if they are images.
        fingerprint: some values of the input, to tell a repeated batch from a new one; None if it had no tensor.
        mean: mean of each input channel over a sample of pixels.
        std: standard deviation of the same sample.
        updated: whether any BN layer updated its statistics in it.
        domain: whose statistics these were; None for the layers' own.
        foreign: whether an evaluation with the weights that `optimizer.eval()` put in, and statistics of those before.
        backwards: backward passes through its output.
        predicted: how often each class was predicted, where that was asked for.
    """

    step: int
    training: bool
    grad: bool
    size: int | None = None
    fingerprint: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    updated: bool = False
    domain: str | None = None
    foreign: bool = False
    backwards: int = 0
    predicted: Tensor | None = None

    @property
    def trains(self) -> bool:
        """Whether it was a training forward: with gradients, in training mode."""
        return self.training and self.grad


@dataclass
class Gap:
    """The last training batch once more, as training and as evaluation normalise it.

    Attributes:
        images: how many images it holds.
        distance: mean total variation distance between the two predicted distributions, 0 to 1; for outputs that
            are no class scores, the norm of the difference over the norm of the outputs, at most 1.
        agreement: share of images of equal predicted class; None for other outputs.
        layers: stored statistics against those of the batch, seen as evaluation normalises.
        live: the same, seen as training normalises.
    """

    images: int
    distance: float
    agreement: float | None
    layers: dict[str, LayerDrift]
    live: dict[str, LayerDrift]


@dataclass
class Trace:
    """What was seen between entering and leaving `watch_bn`.

    Attributes:
        layers: calls of each BN layer, by name.
        forwards: forwards of the whole model, in order; the last 4096 of them.
        steps: optimizer updates.
        unanswered: most training forwards in a row before a backward.
        adapts: whether only BN parameters train, as in test-time adaptation.
        gap: the last training batch under both normalisations, if it could be run again.
    """

    layers: dict[str, LayerCalls] = field(default_factory=dict)
    forwards: deque[Forward] = field(default_factory=lambda: deque(maxlen=MOST_FORWARDS))
    steps: int = 0
    unanswered: int = 0
    adapts: bool = False
    gap: Gap | None = None

    def sizes(self) -> tuple[int | None, int | None]:
        """Height of the images in the last training forward and in the last evaluation."""
        train = [each.size for each in self.forwards if each.trains]
        evaluated = [each.size for each in self.forwards if not each.training and not each.grad]
        return (train or [None])[-1], (evaluated or [None])[-1]

    def updates(self) -> Iterator[list[Forward]]:
        """Training forwards, grouped by the optimizer update that they led to."""
        trained = (each for each in self.forwards if each.trains)
        for _, group in groupby(trained, key=lambda each: each.step):
            yield list(group)
