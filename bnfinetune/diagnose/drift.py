"""Measuring a model's BN statistics against data: how far off, how noisy, at what cost, and by which layers."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bnfinetune.bn.folding.fold import unfolded
from bnfinetune.bn.layers import Selection, find_bn_layers, native_class, select_layers, unwrap
from bnfinetune.bn.population import population_of
from bnfinetune.bn.statistics.batches import ONLY_FIRST_VIEW, BatchReader, device_of, images_tensor, labels_of
from bnfinetune.bn.statistics.layer_statistics import require_values
from bnfinetune.bn.statistics.moments import Moments, Rows
from bnfinetune.bn.statistics.precise import evaluation_mode
from bnfinetune.bn.statistics.recorder import drain, recording
from bnfinetune.diagnose.drift_report import BATCH_SIZES, FITS, DriftReport, LayerReport, Regime
from bnfinetune.diagnose.facts import is_untouched
from bnfinetune.diagnose.layer_drift import ImageRows, LayerDrift, compare, drifts, observing
from bnfinetune.diagnose.prediction import prediction_of
from bnfinetune.errors import StatisticsError

_CHUNK = 64
"""Images per forward where batch statistics stand for the population's."""


def _call(net: nn.Module, images: Tensor) -> Any:
    return net(images)


@torch.no_grad()
def inspect_bn(
    model: nn.Module,
    data: Iterable[Any],
    *,
    images: int = 256,
    layers: Selection = "*",
    exclude: Selection = (),
    steps: int | None = None,
    causes: int = 5,
    training_images: int | None = None,
    forward: Callable[[nn.Module, Tensor], Any] = _call,
    minutes: float | None = None,
    progress: bool = False,
) -> DriftReport:
    """Measures stored BN statistics against data, layer by layer and channel by channel; changes nothing.

    The same images go through the model in evaluation mode under running statistics, under those of each batch as it
    came, and under statistics re-estimated from all of them. Rows of every image's moments give the distance of stored
    from measured statistics, free of sampling noise, and how noisy the statistics of a batch of any size are. Where
    the statistics do not fit, stages and the worst layers are switched to the data's one at a time.

    Args:
        model: any model with BN layers, under a policy or not, in either mode.
        data: any iterable of batches, as `precise_bn` takes them; labels are used where they come along. Shuffled.
        images: how many images to measure; they are held in memory.
        layers: the layers to look at: globs on qualified names, classes or functions of name and layer.
        exclude: the same, of layers to leave out.
        steps: optimizer updates planned, for the weight that the stored statistics will keep.
        causes: how many of the worst layers to switch one at a time; 0 skips it, stages included.
        training_images: size of the training set; by default that of `data`, if it tells.
        forward: calls the model with images of shape (B, C, H, W), where it is called otherwise: a detector by
            `lambda net, images: net.backbone(images)`, say. The prediction is the first tensor with a row for each
            image, or the field that libraries name so; never a loss.
        minutes: after which no further cause is looked for, most of the time where statistics do not fit; the report
            says how many are left out. By default all are.
        progress: show a bar of the passes over the images.

    Returns:
        The report; print it, save it, or write it as a page.

    Examples:
        >>> report = bnf.inspect_bn(model, loader)
        >>> print(report.verdict)

    Raises:
        SelectionError: the model has no BN layer, or a selector matches none.
        StatisticsError: no data, fewer than 2 images, no layer keeps running statistics, or no output has a row for
            each image.
    """
    begin = time.monotonic()
    net = unwrap(model)
    chosen = {
        name: layer
        for name, layer in select_layers(net, layers, exclude).items()
        if population_of(layer).stats is not None
    }
    if not chosen:
        raise StatisticsError("no selected BN layer keeps running statistics; there is nothing to inspect")
    require_values(chosen, affine=True)
    sample = _read(data, images, device_of(net))
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(net))
        stack.enter_context(unfolded(net))  # a folded layer sees what its conv has normalised already
        stack.enter_context(torch.random.fork_rng(devices=_cuda(sample.images.device)))
        bar = stack.enter_context(tqdm(desc="inspect", unit="pass", disable=None if progress else True, leave=False))
        lab = _Lab(partial(forward, net), chosen, sample, bar)
        report = lab.measure(steps, training_images or _size(data))
        return lab.with_causes(report, causes, math.inf if minutes is None else begin + 60 * minutes)


@torch.no_grad()
def layer_drifts(model: nn.Module, images: Tensor) -> dict[str, LayerDrift]:
    """Stored statistics of every layer against those of one batch, as training would normalise it.

    The short form of `inspect_bn`: one forward, and the model is as before.

    Args:
        model: any model with BN layers.
        images: shape (B, C, H, W), on the model's device.
    """
    net = unwrap(model)
    with evaluation_mode(net), unfolded(net):
        layers = {name: layer for name, layer in find_bn_layers(net).items() if population_of(layer).stats is not None}
        with recording(layers, keep=False), observing(layers) as seen:
            seen.images = len(images)
            net(images)
        return drifts(layers, seen)


@dataclass(frozen=True)
class _Sample:
    """The images, their labels if known, and the sizes of the batches that they came in."""

    images: Tensor
    labels: Tensor | None
    sizes: tuple[int, ...]


def _read(data: Iterable[Any], wanted: int, device: torch.device) -> _Sample:
    reader, parts, labels, held = BatchReader(data), [], [], 0
    while held < wanted and (batch := reader.next_batch()) is not None:
        found = images_tensor(batch.data, "inspect_bn")[: wanted - held]
        marks = labels_of(batch.data)
        parts.append(found.to(device))
        labels.append(None if marks is None else marks[: len(found)].to(device))
        held += len(found)
    if held < 2:
        raise StatisticsError(f"the data holds {held} images; inspect_bn needs 2 or more (a generator reads only once)")
    if reader.views > 1:
        warnings.warn(ONLY_FIRST_VIEW.format(views=reader.views), stacklevel=4)
    known = [each for each in labels if each is not None]
    return _Sample(
        torch.cat(parts), torch.cat(known) if len(known) == len(labels) else None, tuple(len(part) for part in parts)
    )


class _Lab:
    """A model in evaluation mode, some of its layers, and a sample to try on them."""

    def __init__(
        self, forward: Callable[[Tensor], Any], layers: dict[str, nn.Module], sample: _Sample, bar: tqdm[Any]
    ) -> None:
        self.forward, self.layers, self.sample, self.bar = forward, layers, sample, bar
        self._reference: Tensor | None = None

    def measure(self, steps: int | None, training_images: int | None) -> DriftReport:
        as_evaluated, running = self._observed()
        with recording(self.layers, keep=False):
            as_trained, by_own = self._observed()
        with recording(self.layers) as recorders:
            batch = self._outputs(self.sample.sizes)
        batches = drain(recorders)
        rows = [as_trained.of(name) for name in self.layers]
        if len(self._chunks()) == 1 and all(seen is None or len(seen.counts) <= len(by_own) for seen in rows):
            self._reference = by_own  # normalised by the statistics of the whole sample already, each layer once
        else:
            with _statistics(self.layers, as_trained):
                self._reference = self._outputs()
        reports = {
            name: _layer_report(name, layer, as_trained.of(name), as_evaluated.of(name), steps)
            for name, layer in self.layers.items()
            if as_trained.of(name) is not None
        }
        if not reports:
            raise StatisticsError("no forward reached any of the selected BN layers")
        return DriftReport(
            images=len(self.sample.images),
            batch_size=max(self.sample.sizes),
            layers=reports,
            running=self._regime(running),
            batch=self._regime(batch),
            reestimated=self._regime(self._reference),
            batch_noise=_batch_noise(self.layers, batches, self.sample.sizes),
            stages={},
            training_images=training_images,
            untouched=all(is_untouched(layer) for layer in self.layers.values()),
        )

    def with_causes(self, report: DriftReport, causes: int, end: float) -> DriftReport:
        """Adds what each stage, and each of the worst layers, recovers when it alone normalises by the data.

        Those that are further from the data than others come first; none begins after `end` of the monotonic clock.
        """
        if not causes or report.drift <= FITS:
            return report
        baseline = _cost(report.running)
        ranked = [layer.name for layer in report.ranked()]
        stages, worst = _stages(list(report.layers)), ranked[:causes]
        self.bar.total = self.bar.n + len(stages) + len(worst)

        def recovered(tries: Mapping[str, Sequence[str]]) -> dict[str, float]:
            order = sorted(tries, key=lambda key: min(map(ranked.index, tries[key])))
            return {key: baseline - self._cost_of(tries[key]) for key in order if time.monotonic() < end}

        by_stage, by_layer = recovered(stages), recovered({name: [name] for name in worst})
        layers = {name: replace(layer, loss_recovered=by_layer.get(name)) for name, layer in report.layers.items()}
        return replace(
            report,
            layers=layers,
            stages={prefix: by_stage[prefix] for prefix in stages if prefix in by_stage},
            left_out=len(stages) + len(worst) - len(by_stage) - len(by_layer),
        )

    def _cost_of(self, names: Sequence[str]) -> float:
        with recording({name: self.layers[name] for name in names}, keep=False):
            return _cost(self._regime(self._outputs()))

    def _observed(self) -> tuple[ImageRows, Tensor]:
        with observing(self.layers) as seen:
            return seen, self._outputs(seen=seen)

    def _outputs(self, sizes: Sequence[int] = (), seen: ImageRows | None = None) -> Tensor:
        """Outputs for the whole sample, in batches of these sizes or in even chunks."""
        parts = []
        for chunk in self._chunks(sizes):
            if seen is not None:
                seen.images = len(chunk)
            parts.append(_prediction(self.forward(chunk), len(chunk)))
        self.bar.update()
        return torch.cat(parts)

    def _chunks(self, sizes: Sequence[int] = ()) -> Sequence[Tensor]:
        images = self.sample.images
        return images.split(list(sizes)) if sizes else images.tensor_split(max(len(images) // _CHUNK, 1))

    def _regime(self, outputs: Tensor) -> Regime:
        labels, reference = self.sample.labels, self._reference
        assert reference is not None
        classes = outputs.ndim == 2 and outputs.shape[1] > 1
        if classes:
            distance = float((outputs.softmax(1) - reference.softmax(1)).abs().sum(1).mean() / 2)
        else:
            norm = torch.linalg.vector_norm
            distance = float(norm(outputs - reference) / (norm(outputs) + norm(reference)).clamp(min=1e-12))
        if not classes or labels is None or int(labels.max()) >= outputs.shape[1]:
            return Regime(None, None, distance)
        accuracy = float((outputs.argmax(1) == labels).double().mean())
        return Regime(accuracy, float(F.cross_entropy(outputs, labels)), distance)


def _prediction(output: Any, images: int) -> Tensor:
    """What a model says of each image, in float32."""
    found = prediction_of(output, images)
    if found is None:
        raise StatisticsError(
            f"the model's output ({type(output).__name__}) has no tensor with a row for each of {images} images; give "
            "forward=, a function of model and images that returns one, such as a feature map"
        )
    return found.float()


def _cost(regime: Regime) -> float:
    return regime.distance if regime.loss is None else regime.loss


def _stages(names: Sequence[str]) -> dict[str, list[str]]:
    """Layers by the first parts of their names: one stage each, as far as names tell stages apart."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        depth = 2 if len(parts) > 2 and parts[1].isdigit() and parts[0] in ("blocks", "stages", "features") else 1
        found.setdefault(".".join(parts[:depth]), []).append(name)
    return found


def _layer_report(
    name: str, layer: Any, trained: Rows | None, evaluated: Rows | None, steps: int | None
) -> LayerReport:
    assert trained is not None
    stats = population_of(layer).stats
    assert stats is not None
    seen = compare(layer, trained)
    momentum = getattr(layer, "momentum", None)
    channels = _channels(layer, trained)
    return LayerReport(
        name=name,
        type=native_class(layer).__name__,
        channels=len(stats.mean),
        drift=_finite(seen.drift),
        drift_in_evaluation=None if evaluated is None else _finite(compare(layer, evaluated).drift),
        mean_shift=tuple(seen.mean_shift.tolist()),
        log_var_ratio=tuple(seen.log_var_ratio.tolist()),
        symmetric_kl=tuple(seen.symmetric_kl.tolist()),
        noise=tuple(seen.noise(size) for size in BATCH_SIZES),
        dead=channels["dead"],
        starved=channels["starved"],
        muted=channels["muted"],
        damaged=channels["damaged"],
        momentum=momentum,
        batches=None if stats.batches is None else int(stats.batches),
        leftover=None if steps is None or momentum is None else (1 - momentum) ** steps,
    )


def _channels(layer: Any, rows: Rows) -> dict[str, tuple[int, ...]]:
    """Channels by what is wrong with them."""
    population = population_of(layer)
    stats, (weight, bias) = population.stats, population.affine
    assert stats is not None
    measured = Moments.pool(rows.counts, rows.means, rows.m2s).var
    stored = stats.var.detach().double().cpu()
    damaged = ~(stats.mean.isfinite() & stats.var.isfinite()).cpu() | (stored < 0)
    muted = torch.zeros_like(damaged)
    for tensor in (weight, bias):
        if tensor is not None:
            damaged |= ~tensor.detach().isfinite().cpu()
    if weight is not None:
        size = weight.detach().abs().cpu()
        muted = size < 1e-3 * size.max()
    marks = {
        "dead": measured < population.eps,
        "starved": (stored < population.eps) & ~damaged,
        "muted": muted,
        "damaged": damaged,
    }
    return {word: tuple(mark.nonzero().flatten().tolist()) for word, mark in marks.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _batch_noise(layers: Mapping[str, Any], batches: Mapping[str, Rows], sizes: Sequence[int]) -> dict[int, float]:
    """Root mean square distance of the statistics of batches from those of all, of the worst layer, by batch size.

    Batches as they came are joined to ones of two, four and more, as long as four are left.
    """
    size, found = sizes[0], {}
    whole = sum(1 for each in sizes if each == size)
    join = 1
    while whole // join >= 4:
        worst = 0.0
        for name, rows in batches.items():
            if len(rows.counts) == len(sizes):
                kept = whole // join * join
                worst = max(worst, _spread(layers[name], Rows(*(part[:kept] for part in rows)).pooled(join)))
        found[size * join] = worst
        join *= 2
    return found


def _spread(layer: Any, rows: Rows) -> float:
    """Root mean square over batches of the weighed distance of their statistics from the pooled ones."""
    pooled = Moments.pool(rows.counts, rows.means, rows.m2s)
    population = population_of(layer)
    scale = pooled.var + population.eps
    offset = (rows.means - pooled.mean) / scale.sqrt()
    ratio = ((rows.m2s / rows.counts[:, None] + population.eps) / scale).sqrt() - 1
    weight, _ = population.affine
    squares = torch.ones_like(scale) if weight is None or not weight.any() else weight.detach().cpu().double().square()
    squared = (offset.square() + ratio.square()) @ (squares / squares.sum())
    return math.sqrt(float(squared.sum()) / (len(squared) - 1))  # the pooled statistics are the batches' own


@contextmanager
def _statistics(layers: Mapping[str, Any], seen: ImageRows) -> Iterator[None]:
    """Lends layers the statistics of what was seen, for the length of the block."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for name, layer in layers.items():
            rows, stats = seen.of(name), population_of(layer).stats
            if rows is None or stats is None:
                continue
            pooled = Moments.pool(rows.counts, rows.means, rows.m2s)
            for buffer, value in ((stats.mean, pooled.mean), (stats.var, pooled.var)):
                kept.append((buffer, buffer.clone()))
                buffer.copy_(value)
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _size(data: Any) -> int | None:
    """Images of the whole set behind a loader."""
    count: Callable[[], int] | None = getattr(getattr(data, "dataset", None), "__len__", None)
    return None if count is None else count()
