"""The fine-tuning loop: groups of micro-batches, one optimizer update each, with pauses to evaluate and save."""

from __future__ import annotations

import gc
import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bnfinetune.bn.layers import is_bn_layer
from bnfinetune.bn.policy.domains import domain, export_domain
from bnfinetune.bn.policy.updates import StatSnapshot
from bnfinetune.bn.statistics.ranks import merge_running_stats
from bnfinetune.errors import CheckpointError, DataError, TrainingError
from bnfinetune.recipe import Recipe
from bnfinetune.training.data.loaders import Loaders, TrainLoader
from bnfinetune.training.data.mixing import build_mixup
from bnfinetune.training.loop.folding import Folding
from bnfinetune.training.loop.gradients import Batch, Gradients, refuse_batch_statistics
from bnfinetune.training.loop.guard import Judgement, StepGuard, Verdict, can_run_ahead, gradient_norm
from bnfinetune.training.loop.losses import build_loss
from bnfinetune.training.loop.nonfinite import likely_cause
from bnfinetune.training.loop.phases import Phase, planned_phases
from bnfinetune.training.loop.progress import Progress, Status, rhythm_of, total_updates
from bnfinetune.training.loop.requests import Asked, Requests, end_by
from bnfinetune.training.measuring.recalibrate import recalibrate
from bnfinetune.training.network.optim import (
    build_optimizer,
    build_schedule,
    can_hold_back,
    count_steps,
    match_formats,
    regroup,
    step_unless,
)
from bnfinetune.training.network.shapes import input_format
from bnfinetune.training.stopwatch import Stopwatch

# torch 2.15 renamed DDP's switch
_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


Show = Callable[[Progress, Status], None]


class Made(NamedTuple):
    """An update: its micro-batches as they were read, its images over all ranks, its number, and its judgement."""

    group: list[Batch]
    images: int
    number: int
    judgement: Judgement


class Pause(Protocol):
    """What the loop calls between updates."""

    def __call__(self, *, evaluate: bool) -> None: ...


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
    clock: Stopwatch = field(default_factory=Stopwatch)
    progress: Progress = field(default_factory=Progress)
    losses: list[tuple[float, int]] = field(default_factory=list)  # mean and images of updates since an evaluation

    def __post_init__(self) -> None:
        train = self.recipe.train
        self.model.to(self.accelerator.device)
        self.image_format = input_format(self.model)
        self.has_bn = any(is_bn_layer(module) for module in self.model.modules())
        self.updates = total_updates(self.recipe, self.loaders.train.batches)
        self.domains = self.recipe.domains
        self.phases = planned_phases(self.recipe, self.updates, self.updates_per_epoch)
        self.optimizer = build_optimizer(self.model, self.recipe.optim, scaled=self.is_scaled)
        self.stepper = self.accelerator.prepare_optimizer(self.optimizer, device_placement=False)
        self.steps_made = 0
        count_steps(self.optimizer, self._note_step)
        self.rhythm = rhythm_of(self.recipe, self.updates)
        self.requests, self.asked = Requests(self.rhythm.minutes), Asked()
        self.last_loss: float | None = math.nan
        self.unread: Made | None = None  # the last update, where the device is left to itself
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
        self.loss_of = build_loss(self.recipe, mixed=self.mixup is not None)
        self._set_up_step()

    def _set_up_step(self) -> None:
        """Build what follows from what trains now: schedule, wrapper of several ranks, guard of the statistics."""
        if self.recipe.train.auto_batch:
            refuse_batch_statistics(self.model)
        self._set_up_schedule()
        self.guard = StepGuard(self.model, self.accelerator)
        self.gradients = Gradients(self.recipe, self.accelerator, self.progress.pieces)
        self.forward = self._wrap()

    @property
    def is_scaled(self) -> bool:
        """Whether a scaler of mixed precision looks at the gradient itself, and decides on each step."""
        return self.accelerator.scaler is not None

    @property
    def updates_per_epoch(self) -> int | None:
        """Optimizer updates per epoch; None for a stream."""
        batches = self.loaders.train.batches
        return None if batches is None else math.ceil(batches / self.recipe.train.grad_accum)

    def _set_up_schedule(self) -> None:
        """Build the schedule of the optimizer's groups, at the present update."""
        self.schedule = build_schedule(self.optimizer, self.recipe.optim.schedule, max(self.updates, 1))
        self._set_rate()

    def _set_rate(self) -> None:
        """Set the learning rate of the next update; at point 0 of its schedule nothing would be learned."""
        self.schedule.step_update(self.progress.update + 1)

    def _note_step(self) -> None:
        self.steps_made += 1

    def enter(self, phase: Phase) -> None:
        """Freeze or unfreeze BN layers; the optimizer and the ranks' wrapper follow what trains now.

        Statistics that freeze are re-estimated first, since the running averages lag behind the weights (Wu & Johnson
        2021, section 3).
        """
        self.read_judgement()
        if phase.freeze:
            chosen = phase.section
            with self.clock.part("statistics"):
                self.merge_statistics()
                selection: dict[str, Any] = {"layers": chosen.layers, "exclude": chosen.exclude}
                recalibrate(self.model, self.loaders, self.recipe, self.accelerator, **selection)
        phase.apply(self.model)
        self.folding.refresh()
        self._follow_policies()

    def _follow_policies(self) -> None:
        """Let the optimizer and the wrapper of several ranks go by what trains now."""
        regroup(self.optimizer, self.model, self.recipe.optim, scaled=self.is_scaled)
        del self.forward  # DDP's hooks go with it, before a new one sets its own
        gc.collect()
        self._set_up_step()

    def _wrap(self) -> nn.Module:
        """The network as it is called in training, over the parameters that train now."""
        forward: nn.Module = self.model
        if self.accelerator.num_processes > 1 and not self.gradients.exchanges:
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
        name = self.recipe.evaluated_domain
        return network if name is None else export_domain(network, name)

    def fit(self, pause: Pause, batches: TrainLoader | None = None, show: Show | None = None) -> None:
        """Train until the last update or until `pause` sets `progress.stopped`.

        Args:
            pause: Called between updates when it is time to evaluate, to save, or both.
            batches: What to train on; None: the images of `loaders`.
            show: Told the state of things after each update.

        Raises:
            TrainingError: Too many updates in a row had a loss or gradient that is not finite, or memory ran out.
            DataError: An image is unreadable, or a worker died.
            SystemExit: SIGTERM came, with code 143; `pause` has saved.
            KeyboardInterrupt: Ctrl-C came; `pause` has saved.
        """
        loader = self.loaders.train if batches is None else batches
        with self.folding.training(), self.requests.heeded():
            if self.progress.update == 0:
                self._enter_phases()
            first = self.recipe.model.head == "fitted" and self.progress.update == 0  # which may stay the best
            if (self.is_over or first) and self.progress.best is None:  # with nothing to train there is no other pause
                with self.folding.paused():
                    pause(evaluate=True)
            try:
                while not self.is_over:
                    self._epoch(loader, pause, show)
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
            with suppress(Exception):  # what came first is what is told
                self.read_judgement()
            with self.folding.paused(), suppress(CheckpointError):
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

    def _epoch(self, loader: TrainLoader, pause: Pause, show: Show | None) -> None:
        """Train from the present position to the end of its epoch."""
        self.forward.train()
        loader.set_position(self.progress.epoch, self.progress.batch)
        for group, ends_epoch in self._groups(loader):
            with self.clock.part("step"):
                self._update(group)
            if ends_epoch:
                self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0
            self._enter_phases()
            if show is not None:
                show(self.progress, self.status)
            evaluate = self.is_evaluation(ends_epoch)
            if evaluate or self._is_save() or any(self.asked):
                self.read_judgement()
                with self.folding.paused():
                    pause(evaluate=evaluate)
                self.requests.saved()
                self.forward.train()
            self.settled = True
            if self.asked.end_by:
                end_by(self.asked.end_by)
            self.asked = Asked()
            if self.is_over:
                return

    def _groups(self, loader: TrainLoader) -> Iterator[tuple[list[Batch], bool]]:
        """Yield (micro-batches of one update as they were read, whether they end the epoch).

        They become floats on the device one by one, when their turn has come.
        """
        batches = loader.as_read()
        following = self._fetch(batches)
        if following is None:
            raise TrainingError("the training data gave no batch: lower train.batch_size or add images")
        while following is not None:
            group: list[Batch] = []
            while following is not None and len(group) < self.recipe.train.grad_accum:
                group.append(following)
                following = self._fetch(batches)
            yield group, following is None

    def _fetch(self, batches: Iterator[Batch]) -> Batch | None:
        begin = time.perf_counter()
        with self.clock.part("data_wait" if self.steps_made else "first_batch"):
            batch = next(batches, None)
        self.progress.waiting += time.perf_counter() - begin
        return batch

    def _update(self, group: list[Batch]) -> None:
        """One optimizer update from the micro-batches of `group`, unless loss or gradient is not finite."""
        begin = time.perf_counter()
        self.settled = False
        self.guard.begin()
        images = self.gradients.count(group)
        loss = self.gradients.compute(self.forward, group, images, self._on_device, self._loss)
        norm = None if self.is_scaled else self._clip()
        judgement = self.guard.judge(loss, norm, self.requests.pending)
        if self._runs_ahead():
            with step_unless(self.optimizer, judgement.bad):
                self._step()
            self.stepper.zero_grad()
            self.guard.undo(judgement.bad)
            self._count(group, images)
            self.progress.seconds += time.perf_counter() - begin
            self.read_judgement()  # of the update before
            self.unread = Made(group, images, self.progress.update, judgement)
        else:
            self._decide(Made(group, images, self.progress.update + 1, judgement))
            self.progress.seconds += time.perf_counter() - begin

    def _runs_ahead(self) -> bool:
        """Whether the device decides alone on a step, so that the host need not wait for it.

        A scaler of mixed precision decides otherwise, and an average of the weights must know.
        """
        ahead = can_run_ahead(self.accelerator.device) and not self.is_scaled and self.ema is None
        return ahead and can_hold_back(self.optimizer)

    def _decide(self, made: Made) -> None:
        """Wait for the verdict on an update, and make it or not."""
        verdict = made.judgement.read()
        good = verdict.good
        if good:
            if self.is_scaled and self.recipe.optim.clip_grad is not None:
                self._clip()  # unscales, and a step must follow that
            good = self._step()
        self.stepper.zero_grad()
        if not good:
            self.guard.undo()
        self._count(made.group, made.images)
        self._note(made, verdict._replace(good=good))

    def read_judgement(self) -> None:
        """Wait for the verdict on the last update whose verdict is not known, and write it down.

        Raises:
            TrainingError: Too many updates in a row were bad.
        """
        made, self.unread = self.unread, None
        if made is not None:
            begin = time.perf_counter()
            with self.clock.part("step"):
                verdict = made.judgement.read()
            self.progress.seconds += time.perf_counter() - begin
            self._note(made, verdict)

    def _step(self) -> bool:
        """Let the optimizer make its step; whether the scaler of mixed precision allowed it.

        Raises:
            TrainingError: It made none, and nobody has said so.
        """
        before = self.steps_made
        self.stepper.step()
        skipped: bool = self.stepper.step_was_skipped
        if self.steps_made == before and not skipped:
            raise TrainingError(
                f"the optimizer made no step at update {self.progress.update + 1}: something in this process, such as "
                "an accumulate block of Accelerate, holds it back; train outside of it"
            )
        return not skipped

    def _count(self, group: list[Batch], images: int) -> None:
        """Go on to the next update; one that was skipped has used its images up all the same."""
        self.progress.update += 1
        self.progress.batch += len(group)
        self.progress.images += images
        self.progress.pieces = self.gradients.pieces
        self._set_rate()

    def _note(self, made: Made, verdict: Verdict) -> None:
        """Write down what has become of an update."""
        progress, self.asked = self.progress, verdict.asked
        self.last_loss = verdict.loss if verdict.good else None
        if verdict.good:
            progress.skipped_in_row = 0
            self.losses.append((verdict.loss, made.images))
            if self.ema is not None:
                self.ema.update(self.model, step=made.number)
            return
        progress.skipped += 1
        progress.skipped_in_row += 1
        if progress.skipped_in_row >= self.recipe.train.max_skipped:
            images = [self.loaders.train.finish(batch[0]) for batch in made.group]
            never = progress.skipped == made.number
            cause = likely_cause(self.recipe, self.model, self.accelerator, images, never=never)
            raise TrainingError(
                f"the loss or gradient was not finite in {progress.skipped_in_row} updates in a row, up to update "
                f"{made.number} (loss {verdict.loss:g}): {cause}"
            )

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
        images = self.loaders.train.finish(images).to(memory_format=self.image_format)
        labels = labels.to(device, non_blocking=True)
        if self.mixup is not None:
            if images is batch[0]:
                images = images.clone()  # it is mixed in place, and may be asked for again
            images, labels = self.mixup(images, labels, self.progress.epoch, self.progress.batch + number, *domains)
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

    @property
    def status(self) -> Status:
        """The last update in numbers; its loss is that of the last one whose verdict is known."""
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return Status(self.last_loss, lr, self.progress.rate)

    def is_evaluation(self, ends_epoch: bool) -> bool:
        """Whether to evaluate after the update just made: at the rhythm asked for, and after the last one."""
        progress, every = self.progress, self.rhythm.evaluate_every
        if progress.update >= self.updates:
            return True
        if every is not None:
            return progress.update % every == 0
        return ends_epoch and progress.epoch % self.recipe.evaluate.every_epochs == 0

    def _is_save(self) -> bool:
        every = self.recipe.checkpoint.every_steps
        if every is None or self.progress.update % every:
            return False
        self.read_judgement()
        return not self.progress.skipped_in_row  # nothing new is worth the place of a state from before

    def networks(self) -> dict[str, nn.Module]:
        """The networks of a training state by name: `model`, and `ema` where weights are averaged."""
        return {"model": self.model} | ({} if self.ema is None else {"ema": self.ema.module})

    def state(self) -> dict[str, Any]:
        """What a training state holds besides networks, policies and random states."""
        scaler = self.accelerator.scaler
        return {
            "progress": asdict(self.progress),
            "losses": [list(pair) for pair in self.losses],
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "grad_accum": self.recipe.train.grad_accum,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned, on any number of ranks with the same global batch."""
        self.progress = Progress(**state["progress"])
        # batches of an epoch are counted per rank; updates begin at whole groups of them
        self.progress.batch = self.progress.batch // state["grad_accum"] * self.recipe.train.grad_accum
        self.losses = [(float(loss), int(images)) for loss, images in state["losses"]]
        self._follow_policies()  # phases already entered have changed what trains
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
        match_formats(self.optimizer)

    def take_losses(self) -> dict[str, float | None]:
        """The mean training loss of an image since it was last asked for, and the present learning rate."""
        images = sum(number for _, number in self.losses)
        mean = sum(loss * number for loss, number in self.losses) / images if images else None
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
