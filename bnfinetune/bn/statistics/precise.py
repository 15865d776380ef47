"""Population statistics computed anew, with fixed weights, from the data that the model will see: precise-BN.

Running averages mix the statistics of many past weights and forget all but the last few batches. With the weights
fixed, one pass over the data gives the statistics that the averages only chase. Source: Wu and Johnson, "Rethinking
'Batch' in BatchNorm", 2021, section 3. On the data of another domain the same pass is AdaBN (Li et al., "Revisiting
Batch Normalization For Practical Domain Adaptation", 2016).

Where the data are few or far from what the network knows, `prior` holds its statistics back towards the stored ones.

A pass is a transaction: buffers are written in place, in one step, after all else has succeeded.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnfinetune.bn.class_change import input_of_call
from bnfinetune.bn.folding.fold import unfolded
from bnfinetune.bn.layers import Selection, bn_class, bn_tail, find_bn_layers, select_layers, unwrap
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.bn.population import population_of
from bnfinetune.bn.put_back import kept_buffers, modes_put_back
from bnfinetune.bn.statistics.batches import ONLY_FIRST_VIEW, Forward, device_of, model_input, to_device
from bnfinetune.bn.statistics.collectives import ProcessGroup, require_same_layers, together
from bnfinetune.bn.statistics.estimators import VARIANCES
from bnfinetune.bn.statistics.layer_statistics import NewStatistics, held, recorded, require_values, write
from bnfinetune.bn.statistics.recorder import forwards_replaced
from bnfinetune.bn.statistics.report import LayerChange, PreciseBNReport, doubts, layer_changes
from bnfinetune.bn.statistics.shrinkage import check_prior, data_share, samples_in, shrink
from bnfinetune.bn.statistics.statistics_pass import Limits, Pass
from bnfinetune.errors import StatisticsError


class PassPlan(NamedTuple):
    """What becomes of each BN layer: these names are updated, and the others of the selection are not."""

    updated: dict[str, nn.Module]
    frozen: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()


@torch.no_grad()
def precise_bn(
    model: nn.Module,
    data: Iterable[Any],
    *,
    num_batches: int | None = None,
    num_samples: int | None = None,
    tolerance: float | None = None,
    variance: str = "pooled",
    momentum: float | None = None,
    prior: float = 0.0,
    through: str = "batch",
    layers: Selection = "*",
    exclude: Selection = (),
    include_frozen: bool = False,
    forward: Forward | None = None,
    progress: bool = False,
    process_group: ProcessGroup = None,
) -> PreciseBNReport:
    """Recomputes the running statistics of BN layers from data, with the weights as they are.

    During the pass each selected layer normalises by its local batch, whatever its mode and `train_stats`; everything
    else runs in evaluation mode, other BN layers with their stored statistics. The mode of every module is put back.
    Calls in one forward all count. If anything fails (a short loader, NaN, Ctrl-C), the model is bit for bit what
    it was. `num_batches_tracked` stays, as it counts training updates, except under `variance="ema"`, which makes such
    updates.

    In a process group this is a collective: every rank calls it with its share of the data, of any size, even none;
    all ranks end with the same bits. Rows that distributed samplers and Accelerate repeat to even out the ranks are
    left out (see `bnfinetune.bn.statistics.padding`). A fault on one rank is raised on all.

    Deeper layers see what batch normalisation leaves of each batch, so batches should hold about 100 samples or more.
    A layer that gets one value per channel from a batch takes it as a batch of variance 0.

    Args:
        model: any model with BN layers, under a policy or not, compiled or in DDP; in either mode.
        data: any iterable of batches: tensors, tuples or lists with the images first, or dicts with `image`,
            `pixel_values` or `x`. Of a list with one image or dict for each sample, as detectors take it, the model
            gets the list; of several views of each sample it gets the first, with a warning. Batches are moved to the
            model's device.
        num_batches: how many batches to read on each rank.
        num_samples: how many samples to read over all ranks; the last batch is cut to fit.
        tolerance: stop as soon as the estimated standard error of every channel's mean (in units of its standard
            deviation) and variance (relative) is below this, after at least 8 batches. Needs shuffled data. With
            `num_batches` or `num_samples`, whichever comes first. Running out of data is a warning.
        variance: `pooled` (of all values), `mean` (of the unbiased batch variances) or `ema` (as in training);
            formulas and sources are in `bnfinetune.bn.statistics.estimators`.
        momentum: for `ema`; by default each layer's own.
        prior: N, in samples: how much the statistics that the model holds count beside those of n samples of data; 0
            replaces them, infinity keeps them. Formulas and sources are in `bnfinetune.bn.statistics.shrinkage`;
            `choose_prior` finds one. Not for `ema`, which starts from the stored statistics anyway.
        through: what the selected layers normalise by during the pass, and so what deeper layers see: `batch`, each
            batch's own statistics, or `mixture`, these held back by the stored as `prior` says, as it will be
            afterwards. For `mixture`, give `num_samples` or a list of batches: n must be known beforehand.
        layers: the layers to update: globs on qualified names, classes or functions of name and layer.
        exclude: the same, of layers to leave out.
        include_frozen: update also layers whose statistics a policy, or their class, has frozen.
        forward: called as `forward(model, batch)` with the whole batch, for models that take more than images.
        progress: show a progress bar.
        process_group: the ranks that pool their statistics; the default group if None.

    Returns:
        A report on every layer; print it, or save it as JSON.

    Raises:
        SelectionError: the model has no BN layer, or a selector matches none.
        LayerError: a layer's class has a `forward` of its own and is not registered.
        ShortDataError: the data ended before `num_batches` or `num_samples`.
        StatisticsError: no data, nothing to update, values that are not finite, or a fault on another rank.
    """
    net = unwrap(model)

    def plan_pass() -> tuple[Limits, PassPlan]:
        _check_estimate(variance, momentum, tolerance)
        check_prior(prior, through, variance)
        return Limits(num_batches, num_samples, tolerance), _plan(net, layers, exclude, include_frozen)

    limits, plan = together(plan_pass, process_group)
    mixes = bool(prior) and through == "mixture"
    share = data_share(prior, samples_in(data, num_samples, process_group)) if mixes else 1.0
    device = device_of(net)

    def call(batch: Any) -> object:
        if forward is not None:
            return forward(net, to_device(batch, device))
        return net(to_device(model_input(batch), device))

    start = time.perf_counter()
    with transaction(net), unfolded(net):
        require_same_layers(channels(plan.updated), process_group)
        with (
            evaluation_mode(net),
            _stored_statistics(net, plan.updated),
            recorded(plan.updated, variance, momentum, share) as statistics,
        ):
            run = Pass(call, data, statistics, limits, progress=progress, group=process_group)
            run.run()
        own = run.new_statistics(with_errors=variance != "ema")
        stored = held(statistics, own)
        share = share if mixes else data_share(prior, run.samples)
        new = shrink(own, stored, share)
        cut = (ONLY_FIRST_VIEW.format(views=run.views),) if forward is None and run.views > 1 else ()
        changes = layer_changes(statistics, stored, own, new)
        found = (*cut, *doubts(run, own, limits, data))
        report = _report(plan, run, changes, own, limits, found, variance, share, time.perf_counter() - start)
        write(statistics, new, count_batches=variance == "ema")
    for text in report.warnings:
        warnings.warn(text, stacklevel=3)
    return report


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode for the length of the block, then each back into its own."""
    with modes_put_back(model):
        for module in model.modules():
            if hasattr(module, "training"):
                module.training = False
        yield


@contextmanager
def transaction(model: nn.Module) -> Iterator[None]:
    """Runs a block in eager mode and without gradients; on any exception, all buffers are as before."""
    put_back = kept_buffers(model)
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would not notice the recorders
            yield
    except BaseException:
        put_back()
        raise


@contextmanager
def _stored_statistics(model: nn.Module, updated: Mapping[str, nn.Module]) -> Iterator[None]:
    """Lets BN layers that are not updated normalise with their running statistics, where their policy would not."""

    def normalise(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        x, population = input_of_call(None, args, kwargs), population_of(layer)
        stats = population.require_stats()
        y = F.batch_norm(x, stats.mean, stats.var, *population.affine, False, 0.0, population.eps)
        return bn_tail(layer)(y)

    others = [layer for name, layer in find_bn_layers(model).items() if name not in updated and bn_class(layer)]
    tracked = [layer for layer in others if population_of(layer).stats is not None]
    unlike = [layer for layer in tracked if switches_of(layer).eval_stats != "running"]
    with forwards_replaced({layer: partial(normalise, layer) for layer in unlike}):
        yield


def _check_estimate(variance: str, momentum: float | None, tolerance: float | None) -> None:
    if variance not in VARIANCES:
        raise StatisticsError(f"variance={variance!r}; choose one of {', '.join(VARIANCES)}")
    if variance != "ema" and momentum is not None:
        raise StatisticsError(f"momentum={momentum} has no meaning with variance={variance!r}; use variance='ema'")
    if momentum is not None and not 0 < momentum <= 1:
        raise StatisticsError(f"momentum={momentum}; give the weight of a new batch, above 0 and at most 1")
    if variance == "ema" and tolerance is not None:
        raise StatisticsError("tolerance has no meaning with variance='ema', whose error never vanishes; use 'pooled'")


def _plan(net: nn.Module, layers: Selection, exclude: Selection, include_frozen: bool) -> PassPlan:
    selected = select_layers(net, layers, exclude)
    untracked = tuple(name for name, layer in selected.items() if population_of(layer).stats is None)
    tracked = {name: layer for name, layer in selected.items() if name not in untracked}
    frozen = () if include_frozen else tuple(name for name, layer in tracked.items() if is_frozen(layer))
    updated = {name: layer for name, layer in tracked.items() if name not in frozen}
    if not updated:
        reason = f"{len(frozen)} are frozen (pass include_frozen=True)" if frozen else ""
        lacking = f"{len(untracked)} have no running statistics (track_running_stats=False)" if untracked else ""
        raise StatisticsError(
            f"nothing to update: of {len(selected)} selected BN layers " + " and ".join(filter(None, [reason, lacking]))
        )
    require_values(updated)
    return PassPlan(updated, frozen, untracked)


def channels(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """How many channels each of the layers has, by its name."""
    return {name: len(stats.mean) for name, layer in layers.items() if (stats := population_of(layer).stats)}


def is_frozen(layer: nn.Module) -> bool:
    """Whether training leaves a layer's running statistics as they are."""
    switches = switches_of(layer)
    return switches.update_stats == "none" or switches.train_stats == "running"


def _report(
    plan: PassPlan,
    run: Pass,
    changes: dict[str, LayerChange],
    own: Mapping[str, NewStatistics],
    limits: Limits,
    found: tuple[str, ...],
    variance: str,
    share: float,
    seconds: float,
) -> PreciseBNReport:
    known = [stats.error.worst for stats in own.values() if stats.error is not None]
    error = max(known, default=math.inf)
    return PreciseBNReport(
        layers=changes,
        uncalled=tuple(name for name in plan.updated if name not in own),
        frozen=plan.frozen,
        untracked=plan.untracked,
        variance=variance,
        share=share,
        samples=run.samples,
        batches=run.batches,
        tolerance=limits.tolerance,
        error=error if math.isfinite(error) else None,
        seconds=seconds,
        warnings=found,
    )
