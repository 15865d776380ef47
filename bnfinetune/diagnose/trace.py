"""What was seen of a model while some steps of a loop ran."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

from torch import Tensor

from bnfinetune.diagnose.first_loss import FirstLoss
from bnfinetune.diagnose.layer_drift import LayerDrift

MOST_FORWARDS = 4096


@dataclass
class LayerCalls:
    """How one BN layer was called.

    Attributes:
        was_apart: it has stood in evaluation mode while the model trained.
        unfrozen: updates of its statistics after that.
        updating: forwards with gradients that updated its statistics.
        momentum: with which the last of them did.
        silent: forwards without gradients that did.
        averaged: more of them, with the weights that `optimizer.eval()` put in, not yet followed by an evaluation;
            schedule-free's own way to statistics of these weights.
        recomputed: recomputations in backward that did.
        normalised: forwards with gradients in training mode, updating or not.
    """

    was_apart: bool = False
    unfrozen: int = 0
    updating: int = 0
    momentum: float | None = None
    silent: int = 0
    averaged: int = 0
    recomputed: int = 0
    normalised: int = 0


@dataclass
class Forward:
    """One forward of the whole model, or of a part of it that was called by itself.

    Attributes:
        step: optimizer updates done before it.
        training: mode of the model.
        grad: whether gradients were recorded.
        images: how many samples the first tensor of the input holds; 0 if there is none.
        size: height of the images, if they are images.
        fingerprint: some values of the input, to tell a repeated batch from a new one; None if it had no tensor.
        mean: mean of each input channel over a sample of pixels.
        std: standard deviation of the same sample.
        between: variance of the images' own means of each input channel.
        updated: whether any BN layer updated its statistics in it.
        domain: whose statistics these were; None for the layers' own.
        foreign: whether an evaluation with the weights that `optimizer.eval()` put in, and statistics of those before.
        part: name of the part; empty for the whole model.
        backwards: backward passes through its output.
        predicted: how often each class was predicted, where that was asked for.
    """

    step: int
    training: bool
    grad: bool
    images: int = 0
    size: int | None = None
    fingerprint: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    between: Tensor | None = None
    updated: bool = False
    domain: str | None = None
    foreign: bool = False
    part: str = ""
    backwards: int = 0
    predicted: Tensor | None = None

    @property
    def trains(self) -> bool:
        """Whether it was a training forward: with gradients, in training mode."""
        return self.training and self.grad


@dataclass
class Gap:
    """A batch of the loop once more, as training and as evaluation normalise it.

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

    def without(self, names: Collection[str]) -> Gap:
        """The same without these layers."""
        layers, live = ({n: each for n, each in of.items() if n not in names} for of in (self.layers, self.live))
        return replace(self, layers=layers, live=live)


@dataclass
class Trace:
    """What was seen between entering and leaving `watch_bn`.

    Attributes:
        layers: calls of each BN layer, by name.
        forwards: forwards of the whole model and of parts that were called by themselves, in order; the last 4096.
        steps: optimizer updates.
        unanswered: most training forwards in a row before a backward.
        adapts: whether only BN parameters train, as in test-time adaptation.
        gaps: the last training batches under both normalisations, the newest first, if they could be run again.
        held_out: the same for the last batch that was evaluated, if it was large enough.
        no_gap: why `gaps` is empty.
        from_start: whether the optimizer had not made a step yet when the watch began, as far as it tells.
        first_inputs: the first BN layer's statistics against those of the first training batch, before any update.
        first_loss: of the batch before the first optimizer update, where the model gives class scores.
        warming: layers whose running statistics still hold much of their construction.
    """

    layers: dict[str, LayerCalls] = field(default_factory=dict)
    forwards: deque[Forward] = field(default_factory=lambda: deque(maxlen=MOST_FORWARDS))
    steps: int = 0
    unanswered: int = 0
    adapts: bool = False
    gaps: list[Gap] = field(default_factory=list)
    held_out: Gap | None = None
    no_gap: str = "no training batch that was run again"
    warming: tuple[str, ...] = ()
    from_start: bool = True
    first_inputs: LayerDrift | None = None
    first_loss: FirstLoss | None = None

    @property
    def gap(self) -> Gap | None:
        """The training batch that both normalisations agree on best: mixed or odd ones are not the measure."""
        return min(self.gaps, key=lambda gap: gap.distance, default=None)

    def without(self, names: Collection[str]) -> Trace:
        """What was seen of all layers but these."""
        layers = {name: calls for name, calls in self.layers.items() if name not in names}
        return replace(self, layers=layers, gaps=[gap.without(names) for gap in self.gaps])

    @property
    def trained(self) -> bool:
        """Whether a training forward was seen."""
        return any(forward.trains for forward in self.forwards)

    @property
    def evaluated(self) -> bool:
        """Whether an evaluation was seen: a forward without gradients, of what trains or of the whole."""
        parts = {"", *(forward.part for forward in self.forwards if forward.trains)}
        return any(not forward.grad and forward.part in parts for forward in self.forwards)

    def sizes(self) -> tuple[int | None, int | None]:
        """Height of the images in the last training forward, and in the last evaluation of the same part."""
        train = [each for each in self.forwards if each.trains]
        if not train:
            return None, None
        alike = [each for each in self.forwards if each.part == train[-1].part]
        evaluated = [each.size for each in alike if not each.training and not each.grad]
        return train[-1].size, (evaluated or [None])[-1]

    def updates(self) -> Iterator[list[Forward]]:
        """Training forwards, grouped by the optimizer update that they led to."""
        trained = (each for each in self.forwards if each.trains)
        for _, group in groupby(trained, key=lambda each: each.step):
            yield list(group)
