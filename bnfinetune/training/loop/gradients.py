"""The gradient of one update: micro-batches, ranks, and as many pieces as the memory asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bnfinetune.bn.layers import find_bn_layers, is_bn_layer
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.errors import RecipeError, TrainingError
from bnfinetune.recipe import Recipe
from bnfinetune.training.loop.memory import enough_memory, is_out_of_memory
from bnfinetune.training.saving.states import random_state, restore_random_state

Batch = tuple[Tensor, ...]  # images, targets and, where images have domains, their numbers
_REMEDIES = (
    "lower it and raise train.grad_accum to keep the global batch, or set train.auto_batch=true, "
    "model.grad_checkpointing=true, train.mixed_precision=bf16 or a smaller data.image_size"
)


class Gradients:
    """Runs forward and backward over the micro-batches of an update: each image of all ranks weighs the same.

    With `train.auto_batch`, an update that does not fit into memory is begun again with every micro-batch in twice as
    many pieces, down to single images. The gradient is the same mean over the same images, so the global batch stays
    as it is; what is drawn in the network (dropout) is drawn per piece. Ranks may use different numbers of pieces:
    they exchange gradients once, after the last backward, and not during it. Nor can DDP exchange them during it where
    domains have an affine of their own, since a batch need not hold images of each.

    Attributes:
        exchanges: Whether ranks exchange gradients here, and not in DDP.

    Args:
        recipe: Batch size and `train.auto_batch`.
        accelerator: For backward, the device and the number of processes.
        pieces: Into how many pieces micro-batches are cut to begin with.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, pieces: int = 1) -> None:
        self._accelerator = accelerator
        self._automatic = recipe.train.auto_batch
        own_affine = any(section.domain_affine == "own" for section in recipe.bn_sections)
        self.exchanges = accelerator.num_processes > 1 and (self._automatic or own_affine)
        self._setting = f"train.batch_size={recipe.train.batch_size} per process"
        self.pieces = pieces

    def count(self, group: Sequence[Batch]) -> int:
        """Images of an update over all ranks, of which this one holds `group`."""
        images = sum(len(batch[0]) for batch in group)
        if self._accelerator.num_processes == 1:
            return images
        total = torch.tensor(images, device=self._accelerator.device)
        torch.distributed.all_reduce(total)
        return int(total)

    def compute(
        self,
        forward: nn.Module,
        group: Sequence[Batch],
        images: int,
        prepare: Callable[[Batch, int], Batch],
        loss_of: Callable[[Batch], Tensor],
    ) -> Tensor:
        """Leave the gradient of the mean loss of an update's images in the parameters.

        Args:
            forward: The network as training calls it.
            group: Micro-batches as the loader gives them.
            images: From `count`.
            prepare: Mixes the micro-batch of a number and brings it to the device, the same each time.
            loss_of: The mean loss of a piece of a prepared micro-batch, from a call of `forward`.

        Returns:
            This rank's share of the mean loss, a scalar without gradient: its mean over the ranks is that over images.

        Raises:
            TrainingError: The memory does not suffice.
        """
        device = self._accelerator.device
        draws = random_state(device) if self._automatic else None
        while True:
            largest = max(-(-len(batch[0]) // self.pieces) for batch in group)
            try:
                with enough_memory(device, self._setting, _REMEDIES):
                    return self._backward(forward, group, images, prepare, loss_of)
            except TrainingError as error:
                if draws is None or error.__cause__ is None or not is_out_of_memory(error.__cause__):
                    raise
                if largest == 1:
                    raise TrainingError(f"{error} (train.auto_batch is down to single images)") from error
            # out of the handler, whose traceback would keep the tensors of the failed attempt
            self.pieces *= 2
            forward.zero_grad(set_to_none=True)
            restore_random_state(draws, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _backward(
        self,
        forward: nn.Module,
        group: Sequence[Batch],
        images: int,
        prepare: Callable[[Batch, int], Batch],
        loss_of: Callable[[Batch], Tensor],
    ) -> Tensor:
        total = images / self._accelerator.num_processes  # ranks' gradients are averaged, not summed
        loss_sum = torch.zeros((), device=self._accelerator.device)
        for number, batch in enumerate(group):
            last = number == len(group) - 1
            for piece in _cut(prepare(batch, number), self.pieces):
                share = len(piece[0]) / total
                with _exchange(forward, now=last and not self.exchanges):
                    loss = loss_of(piece)
                    self._accelerator.backward(loss * share)
                loss_sum += loss.detach() * share
        if self.exchanges:
            average_gradients(forward.parameters(), self._accelerator.num_processes)
        return loss_sum


def average_gradients(parameters: Iterable[nn.Parameter], ranks: int) -> None:
    """Give every rank the mean of all ranks' gradients, in two all-reduces.

    A parameter without a gradient on a rank counts there as one of zero, and gets none if no rank has one.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    present = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
    present = present.to(trained[0].device)
    torch.distributed.all_reduce(present)
    used = [parameter for parameter, count in zip(trained, present.tolist(), strict=True) if count]
    if not used:
        return
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in used if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / ranks
    torch.distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def refuse_batch_statistics(model: nn.Module) -> None:
    """Make sure that no BN layer looks at the batch in training, so that a smaller one changes nothing.

    Raises:
        RecipeError: One does.
    """
    if not any(is_bn_layer(module) for module in model.modules()):
        return
    kinds = {name: switches_of(layer) for name, layer in find_bn_layers(model).items()}
    looking = [name for name, kind in kinds.items() if (kind.train_stats, kind.update_stats) != ("running", "none")]
    if looking:
        raise RecipeError(
            f"train.auto_batch=true cannot halve the batch of {len(looking)} BN layers, {looking[0]} for one: they "
            "use its statistics, and half a batch has others; freeze them (recipe=freeze_bn or freeze_stats), or lower "
            "train.batch_size yourself"
        )


def _cut(batch: Batch, pieces: int) -> list[Batch]:
    """A micro-batch in at most so many pieces of nearly even size."""
    parts = [tensor.tensor_split(min(pieces, len(tensor))) for tensor in batch]
    return list(zip(*parts, strict=True))


def _exchange(forward: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Exchange gradients between ranks only in the backward of a group's last micro-batch."""
    if now or not hasattr(forward, "no_sync"):
        return nullcontext()
    no_sync: Any = forward.no_sync
    waiting: AbstractContextManager[Any] = no_sync()
    return waiting
