"""No update from a loss or a gradient that is not finite, and all ranks of one mind about it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from bnfinetune.bn.layers import find_bn_layers, is_bn_layer
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.bn.policy.updates import StatSnapshot
from bnfinetune.training.loop.requests import Asked


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

    def undo(self) -> None:
        """Give the running statistics back the values from before the update."""
        if self._snapshot is not None:
            self._snapshot.rollback()

    def judge(self, loss: Tensor, norm: Tensor | None, pending: Asked) -> tuple[float, bool, Asked]:
        """Whether all ranks may make the update, and what they have been asked for.

        Args:
            loss: This rank's share, from `Gradients.compute`, a scalar.
            norm: A norm of the gradient, a scalar; None leaves the gradient to the scaler of mixed precision.
            pending: What this rank has been asked for.

        Returns:
            The mean loss of all ranks' images, whether losses and gradient are finite on all ranks, and what any rank
            was asked for.
        """
        known = torch.stack([loss] if norm is None else [loss, norm.to(loss)])
        values = known.tolist()
        bad = not all(map(math.isfinite, values))
        if self._accelerator.num_processes == 1:
            return values[0], not bad, pending
        mine = torch.tensor([bad, pending.save, pending.end_by, values[0]], device=loss.device)
        ranks = [torch.empty_like(mine) for _ in range(self._accelerator.num_processes)]
        torch.distributed.all_gather(ranks, mine)
        bads, saves, ends, losses = zip(*(rank.tolist() for rank in ranks), strict=True)
        return sum(losses) / len(losses), not any(bads), Asked(any(saves), int(max(ends)))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients, a scalar; it is not finite if any of them is not, or if it exceeds 1e19."""
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


def _updates_statistics(model: nn.Module) -> bool:
    if not any(is_bn_layer(module) for module in model.modules()):
        return False
    return any(switches_of(layer).update_stats != "none" for layer in find_bn_layers(model).values())
