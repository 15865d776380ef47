"""Watching a few steps of anybody's training loop: hooks while it runs, rules when it is over."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import takewhile
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bnfinetune.bn.class_change import input_of_call
from bnfinetune.bn.folding.fold import unfolded
from bnfinetune.bn.layers import bn_class, find_bn_layers, is_scripted, require_known
from bnfinetune.bn.policy.switched_layer import SwitchedBN, switches_of
from bnfinetune.bn.population import population_of, recomputing
from bnfinetune.bn.statistics.batches import listed_images
from bnfinetune.bn.statistics.precise import evaluation_mode
from bnfinetune.bn.statistics.recorder import recording
from bnfinetune.diagnose.case import Case, Context
from bnfinetune.diagnose.facts import FEW_IMAGES, is_untouched
from bnfinetune.diagnose.finding import Findings
from bnfinetune.diagnose.first_loss import first_loss
from bnfinetune.diagnose.layer_drift import ImageRows, LayerDrift, drifts, observing
from bnfinetune.diagnose.prediction import first_tensor, prediction_of
from bnfinetune.diagnose.registry import known_codes, run_rules
from bnfinetune.diagnose.trace import Forward, Gap, LayerCalls, Trace

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a forward."""

MOST_CONSTRUCTION = 0.01
"""Share of the mean 0 and variance 1 of construction that running statistics lose first; 44 updates by momentum 0.1."""

_TRAINED = 1000  # updates after which statistics are taken for trained, whatever momentum is now
_BATCHES = 4  # that are run again: of so many, hardly all are mixed by halves
_SAMPLE = 32  # pixels a side that input statistics are taken of
_PRINT = 64  # values that tell one batch from another


class watch_bn:  # noqa: N801  (a function to its users, as `torch.no_grad` is)
    """Watches BN layers while some steps of any loop run, and judges them by the doctor's dynamic rules.

    Light hooks count calls, updates and passes; of activations nothing is computed but, once, the moments of what the
    first BN layer gets in the first batch. On leaving, the last four training batches and one that was evaluated, to
    which references are kept, are run twice more, in evaluation mode and without gradients, to compare what training
    and evaluation make of them; modes, statistics and random states are as before.
    After an exception in the block the findings are there too, and the exception goes on.

    Args:
        model: any module with BN layers, wrapped or not. Inside `torch.compile` only whole forwards can be seen.
        optimizer: what trains it; without one, every backward counts as a step.
        process_group: ranks to compare at the end; a collective, so all of them must watch.
        ignore: codes of rules to leave out.
        rerun: whether to run the last batches again on leaving.

    Attributes:
        findings: what was found, and in `unjudged` what too little was seen for; empty until the block is left.
        trace: what was seen.

    Examples:
        >>> with bnf.watch_bn(model, optimizer) as watch:
        ...     for images, labels in islice(loader, 10):
        ...         train_step(images, labels)
        >>> print(watch.findings)

    Raises:
        SelectionError: the model has no BN layer, or `ignore` names no rule.
        LayerError: the model as a whole is scripted.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        process_group: Any = None,
        ignore: Sequence[str] = (),
        rerun: bool = True,
    ) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        self._case = Case(model, optimizer, context=Context(process_group=process_group))
        self._ignore, self._rerun = known_codes(ignore), rerun
        self._watcher: _Watcher | None = None
        self._handles = ExitStack()
        self.findings = Findings()
        self.trace = Trace()

    def __enter__(self) -> watch_bn:
        self._watcher = _Watcher(self._case, self.trace)
        self._handles.enter_context(self._watcher.hooks(self._case.optimizer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.close()
        assert self._watcher is not None
        self._watcher.judge_start()
        if error is None and self._rerun:
            self._watcher.run_again()
        case = Case(self._case.model, self._case.optimizer, context=self._case.context, trace=self.trace)
        if error is not None:  # the other ranks may not get here
            case = Case(case.model, case.optimizer, trace=self.trace)
        self.findings = run_rules(case, ignore=self._ignore)


class _Watcher:
    """The hooks of one `watch_bn`, and what they have noted so far."""

    def __init__(self, case: Case, trace: Trace) -> None:
        self._trace = trace
        self._bare = case.bare
        # A compiled model calls the inner one through its own code, which no hook on the inner one interrupts.
        self._root = case.model if hasattr(case.model, "_orig_mod") else case.bare
        self._layers = find_bn_layers(case.model)
        if is_scripted(self._root):  # takes no hooks, unlike a model around a scripted one
            for name, layer in self._layers.items():
                require_known(layer, name)
        trained = {id(p) for p in self._bare.parameters() if p.requires_grad}
        affine = {id(p) for layer in self._layers.values() for p in layer.parameters(recurse=False)}
        trace.adapts = bool(trained) and trained <= affine
        trace.from_start = case.optimizer is None or not case.optimizer.state
        trace.layers = {name: LayerCalls(was_apart=case.set_apart(name)) for name in self._layers}
        self._optimizer = case.optimizer
        self._trained: list[int] = []  # versions of the statistics after the last training forward
        self._anew = False  # whether forwards without gradients have moved them since, for the optimizer's average
        self._parts = self._parts_of_model()
        self._outermost: nn.Module | None = None  # of the modules that are running
        self._now: Forward | None = None
        self._open = 0
        self._recent: defaultdict[str, deque[Call]] = defaultdict(lambda: deque(maxlen=_BATCHES))
        self._evaluated: dict[str, Call] = {}
        self._first: tuple[Tensor, Tensor] | None = None  # scores before the first update, and their gradient
        self._start = {name: updates_before(layer) for name, layer in self._layers.items()}

    @contextmanager
    def hooks(self, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        with ExitStack() as handles:
            for name, layer in self._layers.items():
                if is_scripted(layer):
                    continue
                handles.callback(layer.register_forward_pre_hook(self._noting(name), with_kwargs=True).remove)
            for part in self._parts:
                handles.callback(part.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                handles.callback(part.register_forward_hook(self._end, always_call=True).remove)
            if optimizer is not None:
                handles.callback(optimizer.register_step_post_hook(self._step).remove)
            yield

    def _parts_of_model(self) -> dict[nn.Module, str]:
        """The model and all in it that holds BN layers, by module: loops may call parts of it by themselves.

        So does Lightning, whose `training_step` runs networks that are children of the module that it is given. Inside
        of what is compiled or scripted no hooks may be set.
        """
        parts = {self._root: ""}
        if self._root is self._bare and not is_scripted(self._bare):
            held = {name.rsplit(".", depth)[0] for name in self._layers for depth in range(1, name.count(".") + 1)}
            parts |= {
                module: name
                for name, module in self._bare.named_modules()
                if name in held and "_orig_mod" not in name and not is_scripted(module)
            }
        return parts

    def _noting(self, name: str) -> Any:
        calls, bare = self._trace.layers[name], self._bare

        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._judges_inputs():
                self._trace.first_inputs = self._compared(layer, input_of_call(None, args, kwargs))
            if not layer.training:
                calls.was_apart |= bare.training and not isinstance(layer, SwitchedBN)
            elif recomputing():
                calls.recomputed += updates_now(layer, recompute=True)
            elif not torch.is_grad_enabled():
                moved = updates_now(layer) and layer.momentum is not None
                averaged = moved and evaluates_others(self._optimizer)
                self._anew |= averaged
                calls.averaged += averaged
                calls.silent += moved and not averaged
            else:
                calls.normalised += 1
                moved = updates_now(layer)
                calls.updating += moved
                calls.momentum = getattr(layer, "momentum", None) if moved else calls.momentum
                calls.unfrozen += moved and calls.was_apart
                if moved and self._now is not None:
                    self._now.updated, self._now.domain = True, getattr(layer, "_bn_domain", None)

        return note

    def _judges_inputs(self) -> bool:
        now = self._now
        return now is not None and now.trains and self._trace.steps == 0 and self._trace.first_inputs is None

    def _compared(self, layer: nn.Module, x: Tensor) -> LayerDrift | None:
        assert self._now is not None
        if self._now.images < FEW_IMAGES or population_of(layer).stats is None:
            return None
        seen = ImageRows(self._now.images)
        seen.add("", x)
        return drifts({"": layer}, seen)[""]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing() or (self._outermost is not None and module is not self._root):
            return
        self._outermost, part, grad = module, self._parts[module], torch.is_grad_enabled()
        mode = module.training if part else self._bare.training
        forward = Forward(self._trace.steps, mode, grad, part=part)
        _describe_input(forward, (args, kwargs))
        if not forward.training and evaluates_others(self._optimizer):
            forward.foreign = not self._computed_anew()
            for calls in self._trace.layers.values():
                calls.averaged = 0  # they were for this
        self._trace.forwards.append(forward)
        self._now = forward
        if first_tensor((args, kwargs), lambda tensor: tensor.requires_grad) is not None:
            return  # not from a loader, and with a graph that must not be kept
        if forward.trains:
            self._recent[part].appendleft((args, kwargs))
        elif not forward.training and not grad and forward.images >= FEW_IMAGES:
            self._evaluated[part] = args, kwargs

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self._outermost or recomputing():
            return
        forward, self._now, self._outermost = self._now, None, None
        if forward is None:
            return
        if forward.trains:
            self._trained, self._anew = self._versions(), False
        out = prediction_of(output, forward.images)
        # A loss that the model computes itself may be left aside by the loop; what it predicts is hardly.
        learns = out if out is not None and out.requires_grad else first_tensor(output, lambda t: t.requires_grad)
        if learns is not None:
            if not forward.part:
                self._open += 1
                self._trace.unanswered = max(self._trace.unanswered, self._open)
            first = learns.detach() if self._judges_loss(learns, forward) else None  # a hook must not hold the graph
            learns.register_hook(lambda gradient: self._backward(forward, first, gradient))
        if self._trace.adapts and out is not None and out.ndim == 2 and out.shape[1] > 1:
            forward.predicted = torch.bincount(out.detach().argmax(1), minlength=out.shape[1])

    def _computed_anew(self) -> bool:
        """Whether somebody has written to statistics since the last training forward; forwards for it are no tests."""
        anew = self._anew or self._versions() != self._trained
        if anew:
            for forward in self._since_training():
                forward.foreign = False
        return anew

    def _since_training(self) -> Iterator[Forward]:
        return takewhile(lambda forward: not forward.trains, reversed(self._trace.forwards))

    def _versions(self) -> list[int]:
        """Which change when somebody writes to the statistics of a layer."""
        means = (layer._buffers.get("running_mean") for layer in self._layers.values())
        return [mean._version for mean in means if mean is not None and not mean.is_inference()]

    def _judges_loss(self, output: Tensor, forward: Forward) -> bool:
        scores = output.ndim == 2 and output.shape[1] > 1 and len(output) == forward.images >= FEW_IMAGES
        return scores and forward.trains and self._trace.steps == 0 and self._first is None

    def _backward(self, forward: Forward, scores: Tensor | None, gradient: Tensor) -> None:
        if scores is not None and self._first is None:
            self._first = scores, gradient.detach().clone()
        forward.backwards += 1
        self._open = 0
        if self._optimizer is None:
            self._trace.steps += 1

    def _step(self, *_: Any) -> None:
        self._trace.steps += 1

    def judge_start(self) -> None:
        """Notes the loss that training began with."""
        self._trace.first_loss = None if self._first is None else first_loss(*self._first)

    @torch.no_grad()
    def run_again(self) -> None:
        """Runs the last batches as evaluation and as training normalise them, and notes what came of it."""
        self._trace.warming = self._warming()
        part = self._most_trained()
        if part is None:
            return
        try:
            gaps = [self._gap(part, call) for call in self._recent[part]]
            evaluated = self._evaluated.get(part)
            self._trace.held_out = None if evaluated is None else self._gap(part, evaluated)
        except Exception as error:  # a model may refuse its training input in evaluation mode in any way
            warnings.warn(
                f"watch_bn could not run the last batches again, so BN201 and BN203 are left out: {error}", stacklevel=4
            )
            return
        self._trace.gaps = [gap for gap in gaps if gap is not None]
        self._trace.no_gap = "no prediction with a row for each image"

    def _most_trained(self) -> str | None:
        """The part of the model whose statistics training moves most often, of those that batches can be run of again.

        Where none moves, as statistics are fixed, the one that trains most often.
        """
        trained = [each for each in self._trace.forwards if each.trains and each.part in self._recent]
        counts = Counter(each.part for each in trained if each.updated) or Counter(each.part for each in trained)
        return counts.most_common(1)[0][0] if counts else None

    def _gap(self, part: str, call: Call) -> Gap | None:
        """One batch under both normalisations; None if it holds no images, or the model predicts nothing of each."""
        images, _ = _images_of(call)
        if images is None:
            return None
        tracked = {name: layer for name, layer in self._layers.items() if population_of(layer).stats is not None}
        live = {name: layer for name, layer in tracked.items() if self._trace.layers[name].updating}
        with evaluation_mode(self._bare), unfolded(self._bare), _same_draws(images.device):
            evaluated, by_running = self._again(part, call, tracked, len(images))
            with recording(live, keep=False):
                trained, by_batch = self._again(part, call, live, len(images))
        if evaluated is None or trained is None:
            return None
        return Gap(len(images), *difference(evaluated, trained), by_running, by_batch)

    def _again(
        self, part: str, call: Call, layers: dict[str, nn.Module], images: int
    ) -> tuple[Tensor | None, dict[str, LayerDrift]]:
        args, kwargs = call
        with observing(layers) as seen:
            seen.images = images
            output = self._bare.get_submodule(part)(*args, **kwargs)
        return prediction_of(output, images), drifts(layers, seen)

    def _warming(self) -> tuple[str, ...]:
        """Layers that train and whose running statistics still hold much of the mean 0 and variance 1 of the start."""
        return tuple(
            name
            for name, calls in self._trace.layers.items()
            if calls.updating
            and is_warming(self._layers[name], self._start[name], calls.updating + calls.silent, calls.momentum)
        )


def evaluates_others(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether an optimizer has put other weights in the place of those that it trains, as schedule-free ones do."""
    groups = [] if optimizer is None or not callable(getattr(optimizer, "eval", None)) else optimizer.param_groups
    return any(group.get("train_mode") is False for group in groups)


def updates_before(layer: Any) -> int | None:
    """Updates of the running statistics since construction; None where they come from a source that did not count."""
    if is_scripted(layer) or layer.running_mean is None:
        return None
    if is_untouched(layer):
        return 0
    counter = getattr(layer, "num_batches_tracked", None)
    return int(counter) or None if counter is not None else None


def is_warming(layer: nn.Module, before: int | None, since: int, momentum: float | None) -> bool:
    """Whether more of the running statistics' construction is left after so many updates than may be.

    After T updates with momentum m, mean 0 and variance 1 still have the weight (1 - m)^T. What counts is the momentum
    of the last update, as sharpness-aware loops set it to 0 in between. It may have been another once, so that from
    some number of updates on the layer is taken for trained.
    """
    cumulative = isinstance(layer, SwitchedBN) and switches_of(layer).update_stats == "cumulative"
    if before is None or before >= _TRAINED or momentum is None or cumulative:
        return False
    return bool((1 - momentum) ** (before + since) > MOST_CONSTRUCTION)


def updates_now(layer: nn.Module, *, recompute: bool = False) -> bool:
    """Whether a call of this layer in training mode moves its running statistics."""
    if getattr(layer, "momentum", None) == 0:
        return False
    if isinstance(layer, SwitchedBN):
        return layer._bn_state.updates and not layer._bn_holds and not recompute
    tracked = layer.running_mean is not None and getattr(layer, "track_running_stats", True)
    known = bn_class(layer) if tracked else None
    return known is not None and not known.frozen


def difference(first: Tensor, second: Tensor) -> tuple[float, float | None]:
    """How far two outputs of the same images are apart; see `Gap`."""
    first, second = first.float(), second.float()
    if first.ndim == 2 and first.shape[1] > 1:
        apart = (first.softmax(1) - second.softmax(1)).abs().sum(1).mean() / 2
        return float(apart), float((first.argmax(1) == second.argmax(1)).float().mean())
    scale = torch.linalg.vector_norm(first) + torch.linalg.vector_norm(second)
    return float(torch.linalg.vector_norm(first - second) / scale.clamp(min=1e-12)), None


def _same_draws(device: torch.device) -> AbstractContextManager[Any]:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@torch.no_grad()
def _images_of(call: Call) -> tuple[Tensor | None, bool]:
    """What a forward got, one row for each image, and whether as a list.

    Images of a list, as detectors take them, are thinned to one size.
    """
    listed = listed_images(call[0])
    if listed is not None:
        return torch.cat([interpolate(image[None], (_SAMPLE, _SAMPLE)) for image in listed]), True
    image = first_tensor(call)
    return (image.detach() if image is not None and image.ndim else None), False


@torch.no_grad()
def _describe_input(forward: Forward, call: Call) -> None:
    """Notes the size of a batch and a few of its values, without waiting for the device."""
    sample, from_list = _images_of(call)
    if sample is None:
        return
    forward.images = len(sample)
    if sample.ndim == 4:
        forward.size = None if from_list else sample.shape[-2]  # detectors bring them to theirs
        rows, columns = (max(side // _SAMPLE, 1) for side in sample.shape[-2:])
        sample = sample[:, :, ::rows, ::columns]
    sample = sample.float()
    forward.fingerprint = (
        sample[:: max(len(sample) // 4, 1)].flatten(1)[:, :: max(sample[0].numel() // _PRINT, 1)].clone()
    )
    if sample.ndim > 1:
        std, mean = torch.std_mean(sample.transpose(0, 1).flatten(1), 1)
        forward.mean, forward.std = mean, std
        each = sample.flatten(2).mean(2) if sample.ndim > 2 else sample
        forward.between = each.var(0, correction=0)
