"""Rules about what the statistics describe: the data at hand, another domain, or a mixture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.drift_report import FOREIGN
from bnfinetune.diagnose.registry import Trouble, rule
from bnfinetune.diagnose.trace import Forward, Trace

MOST_DISTANCE = 0.3
"""Total variation distance above which evaluation and training are taken to predict different things."""

FEW_IMAGES = 8
"""Fewer images than this say too little about statistics."""

_COLLAPSED = 0.8


@rule(
    "BN201",
    "training and evaluation predict different things for the same images",
    "error",
    why="Training normalises by the batch and evaluation by running statistics that do not describe these activations.",
    needs=("trace",),
)
def gap_of_modes(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Training accuracy is good, evaluation is terrible, even on the training images.

    **Cause.** Running statistics that do not describe the present activations: warmed too little, taken of other data,
    copied over, or from before the weights moved.

    **Found by.** The last watched batch of 8 or more images, twice in evaluation mode, once with running statistics and
    once with its own: mean total variation distance of the predicted distributions above 0.3. Layers come in the
    order of their distance, seen as training normalises, so that a fault is not charged to the layers after it.

    ```python
    with bnf.watch_bn(model, optimizer) as watch:
        train_some_steps(model)
    watch.trace.gap.distance                                # 0.7: the pitfall

    bnf.precise_bn(model, loader, num_batches=100)          # repaired: statistics of the present weights and data
    ```
    """
    gap = case.trace.gap if case.trace else None
    if gap is None or gap.images < FEW_IMAGES or gap.distance <= MOST_DISTANCE:
        return
    ranked = sorted(gap.live, key=lambda name: -gap.live[name].drift)
    worst = [name for name in ranked if gap.live[name].drift > gap.live[ranked[0]].drift / 2]
    if worst:
        agreement = "" if gap.agreement is None else f", {gap.agreement:.0%} of {gap.images} images of equal class"
        yield Trouble(
            tuple(worst),
            f"distance of the predictions {gap.distance:.2f}{agreement}; {worst[0]} is off by "
            f"{gap.live[worst[0]].drift:.2g} standard deviations",
            "bnf.precise_bn(model, loader, num_batches=min(len(loader), 100))",
        )


@rule(
    "BN203",
    "fixed statistics of another domain",
    "warning",
    why="Each channel leaves the layer shifted and scaled against what the weights that follow were trained on.",
    needs=("trace",),
)
def foreign_statistics(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Freezing hurts; a frozen backbone is much worse than a live one.

    **Cause.** Statistics of the source domain normalise images of another: other sensors, colours, contrast.

    **Found by.** The last watched batch of 8 or more images: layers that trained with fixed statistics and whose
    inputs are off by more than 0.75 standard deviations (Wasserstein distance, root mean square over channels weighed
    by weight squared), beyond what so few images vary by themselves.

    ```python
    bnf.freeze_bn(model)                                                       # the pitfall, on shifted images

    bnf.precise_bn(model, loader, num_batches=100, include_frozen=True)        # repaired: frozen at target statistics
    ```
    """
    gap = case.trace.gap if case.trace else None
    if gap is None or gap.images < FEW_IMAGES:
        return
    off = {name: each.drift for name, each in gap.layers.items() if name not in gap.live and case.is_fixed(name)}
    off = {name: drift for name, drift in off.items() if drift > FOREIGN}
    if off:
        worst = max(off, key=lambda name: off[name])
        yield Trouble(
            tuple(off),
            f"{worst} is off by {off[worst]:.2g} standard deviations, {len(off)} layers by more than {FOREIGN}",
            "bnf.precise_bn(model, loader, num_batches=min(len(loader), 100), include_frozen=True)",
            "recalibrate.at=[start]",
        )


@rule(
    "BN204",
    "test-time adaptation collapses",
    "error",
    why="Minimising entropy for too long is easiest by predicting one class for everything.",
    needs=("trace",),
)
def collapsing_adaptation(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Accuracy rises, then falls below that of the unadapted model over repeated passes.

    **Cause.** Only BN weights and biases learn, from the model's own predictions, with too high a rate, too small
    batches, or too many passes.

    **Found by.** Where only BN parameters train: the commonest class takes over 80 % of the predictions in the last
    third of the watched forwards, at least half more than in the first tenth.

    ```python
    for _ in range(20):                                                # the pitfall: pass after pass
        adapt_by_entropy(model, optimizer)

    bnf.apply_policy(model, bnf.BNPolicy(eval_stats="mix", affine="frozen"))   # repaired: statistics only
    ```
    """
    assert isinstance(case.trace, Trace)
    counts = [each.predicted for each in case.trace.forwards if each.predicted is not None]
    if len(counts) < 6:
        return
    first, last = _largest_share(counts[: -(-len(counts) // 10)]), _largest_share(counts[-(len(counts) // 3) :])
    if last > _COLLAPSED and last > 1.5 * first:
        adapted = [
            n for n, layer in case.layers.items() if any(p.requires_grad for p in layer.parameters(recurse=False))
        ]
        yield Trouble(
            tuple(adapted),
            f"the commonest class went from {first:.0%} to {last:.0%} of the predictions",
            case.policy(adapted, 'eval_stats="mix"', 'affine="frozen"') + "  # from the unadapted weights",
        )


def _largest_share(counts: list[torch.Tensor]) -> float:
    total = torch.stack(counts).sum(0).double()
    return float(total.max() / total.sum())


@rule(
    "BN209",
    "inputs of different kinds share one set of statistics",
    "warning",
    why="Each kind is normalised by itself in training and by a mixture, or by the last kind, in evaluation.",
    needs=("trace",),
)
def mixed_domains(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Instability; evaluation follows the last forward; adversarial copies spoil clean accuracy.

    **Cause.** Several forwards per step, of source and target, of clean and adversarial images, update the same
    running statistics.

    **Found by.** In 3 or more watched steps, forwards at different places in the step whose input means differ by more
    than a quarter of a standard deviation, and always in the same sense. Different means within a step by chance are
    not reported.

    ```python
    loss = criterion(model(clean), labels) + criterion(model(adversarial), labels)     # the pitfall

    bnf.apply_policy(model, bnf.BNPolicy(domains="adversarial"))                       # repaired
    with bnf.domain(model, "adversarial"):
        loss = loss + criterion(model(adversarial), labels)
    ```
    """
    assert isinstance(case.trace, Trace)
    by_domain: defaultdict[str | None, list[list[Forward]]] = defaultdict(list)
    for group in case.trace.updates():
        described = [each for each in group if each.updated and each.mean is not None]
        for domain in {each.domain for each in described}:
            by_domain[domain].append([each for each in described if each.domain == domain])
    offset, place = max((_largest_offset(steps) for steps in by_domain.values()), default=(0.0, 0))
    if offset > 0.25:
        updating = tuple(name for name, calls in case.trace.layers.items() if calls.updating)
        yield Trouble(
            updating,
            f"inputs of forward {place + 1} of each step are off from the first's by {offset:.2f} standard deviations",
            "with bnf.domain(bnf.apply_policy(model, bnf.BNPolicy(domains='new')), 'new'): output = model(second)",
        )


def _largest_offset(steps: list[list[Forward]]) -> tuple[float, int]:
    """The largest offset of a place in the step against the first, and that place."""
    places = max(map(len, steps))
    whole = [group for group in steps if len(group) == places]
    if len(whole) < 3:
        return 0.0, 0
    return max(((_offset(whole, place), place) for place in range(1, places)), default=(0.0, 0))


def _offset(steps: list[list[Forward]], place: int) -> float:
    """Distance of the input means at two places of a step, where it is surely none of chance; else 0."""
    pairs = [(group[0], group[place]) for group in steps]
    if any(a.mean is None or b.mean is None or a.mean.shape != b.mean.shape for a, b in pairs):
        return 0.0
    apart = torch.stack([(b.mean - a.mean) / a.std.clamp(min=1e-6) for a, b in pairs])  # type: ignore[operator, union-attr]
    mean, error = apart.mean(0), apart.std(0) / len(pairs) ** 0.5
    sure = mean.abs() > 4 * error
    return float((mean.abs() * sure).max())
