"""The fine-tuning loop: groups of micro-batches, one optimizer update each, with pauses to evaluate and save."""

from __future__ import annotations

import gc
import inspect
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bnfinetune.bn.layers import is_bn_layer
from bnfinetune.bn.policy.domains import domain, export_domain
from bnfinetune.bn.policy.updates import StatSnapshot
from bnfinetune.bn.statistics.ranks import merge_running_stats
from bnfinetune.errors import CheckpointError, DataError, TrainingError
from bnfinetune.recipe import Recipe
from bnfinetune.training.data.from_recipe import domains_of, evaluated_domain
from bnfinetune.training.data.loaders import Loaders
from bnfinetune.training.data.mixing import build_mixup
from bnfinetune.training.loop.folding import Folding
from bnfinetune.training.loop.gradients import Batch, Gradients, refuse_batch_statistics
from bnfinetune.training.loop.guard import StepGuard, gradient_norm
from bnfinetune.training.loop.nonfinite import likely_cause
from bnfinetune.training.loop.phases import Phase, planned_phases
from bnfinetune.training.loop.requests import Asked, Requests, end_by
from bnfinetune.training.measuring.measure import input_format
from bnfinetune.training.measuring.recalibrate import recalibrate
from bnfinetune.training.network.optim import build_optimizer, build_schedule

# torch 2.15 renamed DDP's switch
_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


class Pause(Protocol):
    """What the loop calls between updates."""

    def __call__(self, *, evaluate: bool) -> None: ...


@dataclass
class Progress:
    """How far a run has come; saved with every state and restored from it."""

    update: int = 0  # optimizer updates done
    epoch: int = 0  # passes over the training split begun before this one
    batch: int = 0  # batches of this epoch already used, per rank
    images: int = 0  # images trained on, over all ranks
    best: float | None = None  # best value of checkpoint.metric
    best_update: int = 0
    stale: int = 0  # evaluations since the best
    seconds: float = 0.0  # time spent in updates
    waiting: float = 0.0  # part of it spent waiting for data
    stopped: bool = False  # by early stopping
    skipped: int = 0  # updates whose loss or gradient was not finite
    skipped_in_row: int = 0  # the last ones of them
    pieces: int = 1  # that micro-batches are cut into, by train.auto_batch


def total_updates(recipe: Recipe, batches: int | None) -> int:
    """Optimizer updates of the whole run; `batches` per epoch and rank is None for a stream."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert batches is not None  # the recipe schema asks streams for train.steps
    return recipe.train.epochs * math.ceil(batches / recipe.train.grad_accum)


@dataclass
class Trainer:
    """Everything that one run trains with.

    `model` is the bare network that policies, averages and checkpoints see; `forward` is the same network as it is
    called in training, inside DDP on several ranks and compiled on request.
    """

    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module
    loaders: Loaders
    num_classes: int
    progress: Progress = field(default_factory=Progress)
    losses: list[float] = field(default_factory=list)  # of the updates since the last evaluation

    def __post_init__(self) -> None:
        train = self.recipe.train
        self.model.to(self.accelerator.device)
        self.image_format = input_format(self.model)
        self.has_bn = any(is_bn_layer(module) for module in self.model.modules())
        self.updates = total_updates(self.recipe, self.loaders.train.batches)
        self.domains = domains_of(self.recipe)
        self.phases = planned_phases(self.recipe, self.updates, self.updates_per_epoch)
        self.optimizer = self._build_optimizer()
        self.requests, self.asked = Requests(self.recipe.checkpoint.every_minutes), Asked()
        self.settled = False  # whether all that belongs to the last update is done, and nothing of the next
        self.ema = None if train.ema is None else ModelEmaV3(self.model, decay=train.ema, use_warmup=True)
        self.folding = Folding(self.model, self.recipe)
        self.mixup = build_mixup(
            self.recipe.data.augment,
            self.num_classes,
            train.label_smoothing,
            seed=self.recipe.run.seed,
            rank=self.accelerator.process_index,
        )
        # timm's mixup smooths the labels itself
        self.loss_of = (
            SoftTargetCrossEntropy() if self.mixup else nn.CrossEntropyLoss(label_smoothing=train.label_smoothing)
        )
        self._set_up_step()

    def _set_up_step(self) -> None:
        """Build what follows from the network's policies: the wrapper of several ranks, the guard of its statistics."""
        if self.recipe.train.auto_batch:
            refuse_batch_statistics(self.model)
        self.guard = StepGuard(self.model, self.accelerator)
        self.gradients = Gradients(self.recipe, self.accelerator, self.progress.pieces)
        self.forward = self._wrap()

    @property
    def updates_per_epoch(self) -> int | None:
        """Optimizer updates per epoch; None for a stream."""
        batches = self.loaders.train.batches
        return None if batches is None else math.ceil(batches / self.recipe.train.grad_accum)

    def _build_optimizer(self, state: Mapping[Tensor, Any] | None = None) -> torch.optim.Optimizer:
        """A new optimizer and schedule over what trains now, with the given state of parameters that still do."""
        optimizer = build_optimizer(self.model, self.recipe.optim)
        members = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, values in (state or {}).items():
            if parameter in members:
                optimizer.state[parameter] = values
        self.schedule = build_schedule(optimizer, self.recipe.optim.schedule, max(self.updates, 1))
        self.schedule.step_update(self.progress.update)
        self.stepper = self.accelerator.prepare_optimizer(optimizer, device_placement=False)
        return optimizer

    def enter(self, phase: Phase) -> None:
        """Freeze or unfreeze BN layers; the optimizer and the ranks' wrapper follow what trains now.

        Statistics that freeze are re-estimated first, since the running averages lag behind the weights (Wu & Johnson
        2021, section 3).
        """
        if phase.freeze:
            self.merge_statistics()
            chosen = phase.section
            recalibrate(
                self.model, self.loaders, self.recipe, self.accelerator, layers=chosen.layers, exclude=chosen.exclude
            )
        phase.apply(self.model)
        self.folding.refresh()
        self.optimizer = self._build_optimizer(self.optimizer.state)
        del self.forward  # DDP's hooks go with it, before a new one sets its own
        gc.collect()
        self._set_up_step()

    def _wrap(self) -> nn.Module:
        """The network as it is called in training, over the parameters that train now."""
        forward: nn.Module = self.model
        if self.accelerator.num_processes > 1:
            # Accelerate's prepare_model would patch `forward` on the instance for autocast, which deep copies and
            # a second wrapping would carry along. Buffers are not broadcast: that would throw away the statistics of
            # every rank but the first, which `merge_running_stats` keeps.
            device = self.accelerator.device
            ids = None if device.type == "cpu" else [device]
            options: dict[str, Any] = {"device_ids": ids, _KEEP_BUFFERS: False}
            forward = DistributedDataParallel(forward, **options)
        if self.recipe.model.compile:
            forward = torch.compile(forward)  # type: ignore[assignment]
        return forward

    @property
    def evaluated(self) -> nn.Module:
        """The network that is measured and exported: the average where there is one, of one domain a plain copy."""
        network = self.model if self.ema is None else self.ema.module
        name = evaluated_domain(self.recipe)
        return network if name is None else export_domain(network, name)

    def fit(self, pause: Pause) -> None:
        """Train until the last update or until `pause` sets `progress.stopped`.

        Args:
            pause: Called between updates when it is time to evaluate, to save, or both.

        Raises:
            TrainingError: Too many updates in a row had a loss or gradient that is not finite, or memory ran out.
            DataError: An image is unreadable, or a worker died.
            SystemExit: SIGTERM came, with code 143; `pause` has saved.
            KeyboardInterrupt: Ctrl-C came; `pause` has saved.
        """
        bar = tqdm(
            total=self.updates,
            initial=self.progress.update,
            desc=self.recipe.name,
            unit="update",
            dynamic_ncols=True,
            disable=None if self.accelerator.is_main_process else True,  # None: quiet where output is no terminal
        )
        with bar, self.folding.training(), self.requests.heeded():
            if self.progress.update == 0:
                self._enter_phases()
            try:
                while not self.is_over:
                    self._epoch(bar, pause)
            except Exception as error:
                self._leave(pause)
                # torch's signal handler may raise a RuntimeError in the midst of an update
                if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
                    raise DataError(
                        f"a data worker died, often for want of memory: lower data.workers ({error})".splitlines()[0]
                    ) from error
                raise

    def _leave(self, pause: Pause) -> None:
        """Save on the way out of an error, if the state is whole; one rank alone of several cannot."""
        if self.settled and self.accelerator.num_processes == 1:
            with self.folding.paused(), suppress(CheckpointError):  # what came first is what is told
                pause(evaluate=False)
            if self.requests.pending.end_by:  # the signal went to the loader's processes too, and ended them
                end_by(self.requests.pending.end_by)

    def _enter_phases(self) -> None:
        for phase in self.phases:
            if phase.update == self.progress.update:
                self.enter(phase)

    @property
    def is_over(self) -> bool:
        return self.progress.update >= self.updates or self.progress.stopped

    def _epoch(self, bar: Any, pause: Pause) -> None:
        """Train from the present position to the end of its epoch."""
        self.forward.train()
        self.loaders.train.set_position(self.progress.epoch, self.progress.batch)
        for group, ends_epoch in self._groups():
            self._update(group)
            if ends_epoch:
                self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0
            self._enter_phases()
            bar.update()
            if not bar.disable:
                bar.set_postfix_str(self._status(), refresh=False)
            evaluate = self.is_evaluation(ends_epoch)
            if evaluate or self._is_save() or any(self.asked):
                with self.folding.paused():
                    pause(evaluate=evaluate)
                self.requests.saved()
                self.forward.train()
            self.settled = True
            if self.asked.end_by:
                end_by(self.asked.end_by)
            if self.is_over:
                return

    def _groups(self) -> Iterator[tuple[list[Batch], bool]]:
        """Yield (micro-batches of one update, whether they end the epoch), looking one group ahead."""
        batches = iter(self.loaders.train)
        size = self.recipe.train.grad_accum
        group = self._fetch(batches, size)
        if not group:
            raise TrainingError("the training data gave no batch: lower train.batch_size or add images")
        while group:
            following = self._fetch(batches, size)
            yield group, not following
            group = following

    def _fetch(self, batches: Iterator[Batch], size: int) -> list[Batch]:
        begin = time.perf_counter()
        group = list(islice(batches, size))
        self.progress.waiting += time.perf_counter() - begin
        return group

    def _update(self, group: list[Batch]) -> None:
        """One optimizer update from the micro-batches of `group`, unless loss or gradient is not finite."""
        begin = time.perf_counter()
        self.settled = False
        self.guard.begin()
        loss = self.gradients.compute(self.forward, group, self._on_device, self._loss)
        scaled = self.accelerator.scaler is not None  # which looks at the gradient itself
        norm = None if scaled else self._clip()
        value, good, self.asked = self.guard.judge(loss, norm, self.requests.pending)
        if good:
            if scaled and self.recipe.optim.clip_grad is not None:
                self._clip()  # unscales, and a step must follow that
            self.stepper.step()
            good = not self.stepper.step_was_skipped
        self.stepper.zero_grad()
        if not good:
            self.guard.undo()
        self._count(group, value, good)
        self.progress.seconds += time.perf_counter() - begin
        if self.progress.skipped_in_row >= self.recipe.train.max_skipped:
            raise TrainingError(
                f"the loss or gradient was not finite in {self.progress.skipped_in_row} updates in a row, up to update "
                f"{self.progress.update} (loss {value:g}): {likely_cause(self, group)}"
            )

    def _count(self, group: list[Batch], value: float, good: bool) -> None:
        """Write down an update; one that was skipped has used its images up all the same."""
        progress = self.progress
        progress.update += 1
        progress.batch += len(group)
        progress.images += sum(len(labels) for _, labels, *_ in group) * self.accelerator.num_processes
        progress.skipped_in_row = 0 if good else progress.skipped_in_row + 1
        progress.skipped += not good
        progress.pieces = self.gradients.pieces
        self.schedule.step_update(progress.update)
        if good:
            self.losses.append(value)
            if self.ema is not None:
                self.ema.update(self.model, step=progress.update)

    def _clip(self) -> Tensor:
        """The norm of the gradient, after which it is clipped."""
        limit = self.recipe.optim.clip_grad
        if limit is None:
            return gradient_norm(self.model.parameters())
        norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        return norm

    def _on_device(self, batch: Batch, number: int) -> Batch:
        """A micro-batch on the device, mixed as its place in the epoch asks."""
        device = self.accelerator.device
        images, labels, *domains = batch
        images = images.to(device, non_blocking=True, memory_format=self.image_format)
        labels = labels.to(device, non_blocking=True)
        if self.mixup is not None:
            if self.recipe.train.auto_batch:
                images = images.clone()  # it is mixed in place, and may be asked for again
            images, labels = self.mixup(images, labels, self.progress.epoch, self.progress.batch + number)
        return images, labels, *domains

    def _loss(self, batch: Batch) -> Tensor:
        images, labels, *domains = batch
        with self.accelerator.autocast():
            logits = self._by_domain(images, domains[0]) if domains else self.forward(images)
            loss: Tensor = self.loss_of(logits, labels)
        return loss

    def _by_domain(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Logits of a batch of several domains, each normalised by its own images and in its own statistics."""
        rows, parts = [], []
        for number, name in enumerate(self.domains):
            chosen = (numbers == number).nonzero().flatten().to(images.device)
            if len(chosen):
                with domain(self.model, name):
                    parts.append(self.forward(images[chosen]))
                rows.append(chosen)
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _status(self) -> str:
        rate = self.progress.images / max(self.progress.seconds + self.progress.waiting, 1e-9)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        loss = f"{self.losses[-1]:.3f}" if self.losses else "not finite"
        return f"loss {loss}  lr {lr:.2g}  {rate:.0f} images/s"

    def is_evaluation(self, ends_epoch: bool) -> bool:
        """Whether to evaluate after the update just made: at the rhythm asked for, and after the last one."""
        evaluate, progress = self.recipe.evaluate, self.progress
        if progress.update >= self.updates:
            return True
        if evaluate.every_steps is not None:
            return progress.update % evaluate.every_steps == 0
        return ends_epoch and progress.epoch % evaluate.every_epochs == 0

    def _is_save(self) -> bool:
        every = self.recipe.checkpoint.every_steps
        if self.progress.skipped_in_row:  # nothing new is worth the place of a state from before
            return False
        return every is not None and self.progress.update % every == 0

    def networks(self) -> dict[str, nn.Module]:
        """The networks of a training state by name: `model`, and `ema` where weights are averaged."""
        return {"model": self.model} | ({} if self.ema is None else {"ema": self.ema.module})

    def state(self) -> dict[str, Any]:
        """What a training state holds besides networks, policies and random states."""
        scaler = self.accelerator.scaler
        return {
            "progress": asdict(self.progress),
            "losses": self.losses,
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "grad_accum": self.recipe.train.grad_accum,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned, on any number of ranks with the same global batch."""
        self.progress = Progress(**state["progress"])
        # batches of an epoch are counted per rank; updates begin at whole groups of them
        self.progress.batch = self.progress.batch // state["grad_accum"] * self.recipe.train.grad_accum
        self.losses = state["losses"]
        self.optimizer = self._build_optimizer()  # phases already entered have changed what trains
        self._set_up_step()
        self._load_optimizer(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load moments and counters; what the recipe says about the groups stays, since it may have been changed."""
        said = {"lr", "initial_lr", "lr_scale", "weight_decay", *self.recipe.optim.kwargs}
        groups = [{key: group[key] for key in said & group.keys()} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state)
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"train.resume: the state of the optimizer does not fit optim.name={self.recipe.optim.name} and what "
                f"trains now ({error}); leave optim.name, model.trainable and bn as they were"
            ) from error
        for group, values in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(values)

    def take_losses(self) -> dict[str, float | None]:
        """The mean training loss since it was last asked for, and the present learning rate."""
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses.clear()
        return {"train_loss": mean, "lr": max(group["lr"] for group in self.optimizer.param_groups)}

    def merge_statistics(self) -> None:
        """Give all ranks the statistics of all images: before every evaluation and exit."""
        if self.progress.update == 0 or not self.has_bn:
            return
        for model in self.networks().values():
            merge_running_stats(model, count=self.progress.images / self.accelerator.num_processes)

    @contextmanager
    def merged_statistics(self) -> Iterator[None]:
        """Merged statistics within this context, and each rank's own behind it, so that saving changes nothing."""
        if self.accelerator.num_processes == 1 or not self.has_bn:
            yield
            return
        snapshots = [StatSnapshot(model) for model in self.networks().values()]
        for snapshot in snapshots:
            snapshot.take()
        try:
            self.merge_statistics()
            yield
        finally:
            for snapshot in snapshots:
                snapshot.rollback()
