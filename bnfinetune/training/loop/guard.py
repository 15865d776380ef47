"""No update from a loss or a gradient that is not finite, and all ranks of one mind about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from bnfinetune.bn.layers import find_bn_layers, is_bn_layer
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.bn.policy.updates import StatSnapshot
from bnfinetune.training.loop.requests import Asked


class Verdict(NamedTuple):
    """What is known of an update.

    Attributes:
        loss: The mean of all ranks' images.
        good: Whether losses and gradient are finite on all ranks.
        asked: What any rank was asked for before it.
    """

    loss: float
    good: bool
    asked: Asked


class Judgement:
    """A verdict on its way from the device.

    Attributes:
        bad: On the device, a scalar: 1 if the update must not be made, else 0.

    Args:
        ranks: Shape (ranks, 4): whether the update is bad, what was asked for, and the loss of each.
    """

    def __init__(self, ranks: Tensor) -> None:
        self.bad = ranks[:, 0].amax()
        self._ranks, self._copied = ranks, None
        if can_run_ahead(ranks.device):
            self._ranks = torch.empty(ranks.shape, dtype=ranks.dtype, pin_memory=ranks.device.type != "cpu")
            self._ranks.copy_(ranks, non_blocking=True)
            self._copied = torch.Event(ranks.device.type) if ranks.device.type != "cpu" else None
            if self._copied is not None:
                self._copied.record()

    def read(self) -> Verdict:
        """The verdict; waits until the device has come to it, and not for what it was given to do since."""
        if self._copied is not None:
            self._copied.synchronize()
        bads, saves, ends, losses = zip(*self._ranks.tolist(), strict=True)
        return Verdict(sum(losses) / len(losses), not any(bads), Asked(any(saves), int(max(ends))))


def can_run_ahead(device: torch.device) -> bool:
    """Whether a device computes on its own while the host goes on, and says when a copy to the host is complete."""
    return device.type in ("cuda", "xpu")


class StepGuard:
    """Judges an update before the optimizer makes it, and takes a bad one back out of the running statistics.

    Several ranks agree by one exchange of four numbers per update, between backward and step; it also carries what
    signals and the clock have asked of any rank. One process needs none.

    Args:
        model: The bare network under its policies; build a new guard when these change.
        accelerator: Its device and number of processes.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._snapshot = StatSnapshot(model) if _updates_statistics(model) else None

    def begin(self) -> None:
        """Remember the running statistics before the forwards of an update."""
        if self._snapshot is not None:
            self._snapshot.take()

    def undo(self, where: Tensor | None = None) -> None:
        """Give the running statistics back the values from before the update; where given, if that scalar is not 0."""
        if self._snapshot is not None:
            self._snapshot.rollback(None if where is None else where.bool())

    def judge(self, loss: Tensor, norm: Tensor | None, pending: Asked) -> Judgement:
        """Whether all ranks may make the update, and what they have been asked for.

        Args:
            loss: This rank's share, from `Gradients.compute`, a scalar.
            norm: A norm of the gradient, a scalar; None leaves the gradient to the scaler of mixed precision.
            pending: What this rank has been asked for.
        """
        sound = loss.isfinite() if norm is None else loss.isfinite() & norm.isfinite().to(loss.device)
        asked = [torch.full_like(loss, number) for number in pending]  # filled there: a copy would wait
        mine = torch.stack([(~sound).to(loss), *asked, loss])
        ranks = [mine]
        if self._accelerator.num_processes > 1:
            ranks = [torch.empty_like(mine) for _ in range(self._accelerator.num_processes)]
            torch.distributed.all_gather(ranks, mine)
        return Judgement(torch.stack(ranks))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients, a scalar; it is not finite if any of them is not, or if it exceeds 1e19."""
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


def _updates_statistics(model: nn.Module) -> bool:
    if not any(is_bn_layer(module) for module in model.modules()):
        return False
    return any(switches_of(layer).update_stats != "none" for layer in find_bn_layers(model).values())
