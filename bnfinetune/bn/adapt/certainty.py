"""How good predictions look without labels: each sure of its class, and all together of many classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from bnfinetune.bn.functional import wide_dtype
from bnfinetune.errors import PolicyError


def logits_in(output: Any, samples: int, caller: str, instead: str) -> Tensor:
    """The logits (N, classes, ...) among what a model gives for N samples.

    Args:
        output: a tensor, a tuple or list with the logits first, a dict or an output object with `logits` or `out`.
        samples: N.
        caller: who needs them, for the message.
        instead: what to use where there are none.

    Raises:
        PolicyError: there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = next((output[key] for key in ("logits", "out") if key in output), next(iter(output.values()), None))
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, list | tuple) and output:
        found = output[0]
    is_tensor = isinstance(found, Tensor) and found.is_floating_point() and found.ndim > 1
    if is_tensor and found.shape[0] == samples and found.shape[1] > 1:
        return cast(Tensor, found)
    shape = f" ({', '.join(map(str, found.shape))})" if isinstance(found, Tensor) else ""
    raise PolicyError(
        f"{caller} needs logits (N, classes) or (N, classes, H, W) for {samples} samples, and the model gives a "
        f"{type(output).__name__} with a {type(found).__name__}{shape}; use {instead}"
    )


def certainty(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of each prediction (N, ...), in nats, and the mean prediction (classes,)."""
    log_p = logits.to(wide_dtype(logits.dtype)).log_softmax(1)
    p = log_p.exp()
    return -(p * log_p).sum(1), p.detach().transpose(0, 1).flatten(1).mean(1)


def mutual_information(logits: Tensor, *, several: bool = False) -> float:
    """Information that a prediction holds of its image, in nats: `H(mean_i p_i) - mean_i H(p_i)`.

    Predictions that are all alike, as of a network whose statistics are wrong, hold none, however sure they are.
    Source: Bridle, Heading and MacKay, "Unsupervised Classifiers, Mutual Information and 'Phantom Targets'", 1991.

    Args:
        logits: (N, classes), or (N, classes, H, W), where every pixel is a prediction.
        several: whether an image may be of several classes, each of which is a prediction of its own; then the mean
            over the classes.
    """
    if several:
        each = [mutual_information(one) for one in _yes_or_no(logits)]
        return sum(each) / len(each)
    entropies, mean_prediction = certainty(logits)
    return float(torch.special.entr(mean_prediction).sum() - entropies.mean())


def shared_information(logits: Tensor, others: Tensor) -> float:
    """Information that two predictions of the same images hold of each other, in nats.

    Of classes a, b drawn from both, image by image: `sum_ab J_ab log(J_ab / (J_a J_b))`, `J_ab = mean_i p_ia q_ib`.

    Args:
        logits: (N, classes), or (N, classes, H, W).
        others: the same shape.
    """
    p, q = (each.double().softmax(1).transpose(0, 1).flatten(1) for each in (logits, others))
    joint = p @ q.T / p.shape[1]
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.special.xlogy(joint, joint / apart.clamp(min=torch.finfo(apart.dtype).tiny)).sum())


class InformationGain:
    """Scores predictions without labels: by their information, unless they contradict the first ones.

    Amplified noise makes predictions surer as well: networks whose statistics fitted scored higher with others, at half
    the accuracy. What is lost then is what the predictions under the stored statistics, the first to be scored, had
    told of the images. So whoever shares less than `KEPT` of that information scores minus infinity. Where the stored
    statistics are ruined, there is little to lose.

    Args:
        several: whether an image may be of several classes.
    """

    KEPT = 0.9

    def __init__(self, *, several: bool = False) -> None:
        self.several = several
        self._first: Tensor | None = None
        self._had = 0.0

    def __call__(self, logits: Tensor) -> float:
        """The score of logits (N, classes), or (N, classes, H, W); the first ones are those to be kept to."""
        if self._first is None:
            self._first, self._had = logits, self._shared(logits, logits)
        is_kept = self._shared(self._first, logits) >= self.KEPT * self._had
        return mutual_information(logits, several=self.several) if is_kept else -math.inf

    def _shared(self, first: Tensor, now: Tensor) -> float:
        if not self.several:
            return shared_information(first, now)
        return sum(map(shared_information, _yes_or_no(first), _yes_or_no(now)))


def _yes_or_no(logits: Tensor) -> list[Tensor]:
    """Logits (N, 2) of every class by itself."""
    return [torch.stack([one, torch.zeros_like(one)], 1) for one in logits.unbind(1)]
