"""Rules about what the statistics describe: the data at hand, another domain, or a mixture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.drift_report import FITS, FOREIGN
from bnfinetune.diagnose.facts import FEW_IMAGES, trains_only_head
from bnfinetune.diagnose.registry import Lacking, Trouble, rule
from bnfinetune.diagnose.trace import Forward, Trace

MOST_DISTANCE = 0.3
"""Total variation distance above which evaluation and training are taken to predict different things."""

FEW_BATCHES = 2
"""One batch alone may be an odd one: mixed images, one class, the rest of an epoch."""

FALSE_ALARMS = 0.01
"""Share of sound watches in which a rule that decides by a test may speak, over all that it tests."""

ENOUGH_SAMPLES = 12
"""Images at each place of the step from which on their means are taken for near enough to normal."""

_COLLAPSED = 0.8
_SAMPLE = 16  # images that shares of classes are taken of at least
_TOO_FEW = f"fewer than {FEW_BATCHES} training batches of {FEW_IMAGES} images"


@rule(
    "BN201",
    "training and evaluation predict different things for the same images",
    "error",
    why="Training normalises by the batch and evaluation by running statistics that do not describe these activations.",
    needs=("trace",),
)
def gap_of_modes(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** Training accuracy is good, evaluation is terrible, even on the training images.

    **Cause.** Running statistics that do not describe the present activations: taken of other data, copied over, or
    from before the weights moved.

    **Found by.** The last watched batches, two to four of 8 or more images, each twice in evaluation mode, once with
    running statistics and once with its own: mean total variation distance of the predicted distributions above 0.3
    in every one of them, as mixup and cutmix make single batches differ from the average, and in the last batch that
    was evaluated, if one was; and a layer that is off by more than the statistics of such a batch vary by themselves.
    What is compared is the model's prediction: the `logits` of an output with fields, else
    its first tensor with a row per image; never a loss. Statistics that still hold more than 1 % of their construction
    (44 updates with momentum 0.1) are warming up and not judged; BN202 tells whether the plan is long enough. Layers
    come in the order of their distance, seen as training normalises, so that a fault is not charged to the layers
    after it.

    ```python
    with bnf.watch_bn(model, optimizer) as watch:
        train_some_steps(model)
    watch.trace.gap.distance                                # 0.7: the pitfall

    bnf.precise_bn(model, loader, num_batches=100)          # repaired: statistics of the present weights and data
    ```
    """
    assert isinstance(case.trace, Trace)
    gaps = [gap for gap in case.trace.gaps if gap.images >= FEW_IMAGES]
    if len(gaps) < FEW_BATCHES:
        yield Lacking(_TOO_FEW if case.trace.gaps else case.trace.no_gap)
        return
    if case.trace.warming:
        yield Lacking("running statistics that have warmed up")
        return
    held_out = case.trace.held_out
    if any(each.distance <= MOST_DISTANCE for each in (*gaps, *([] if held_out is None else [held_out]))):
        return
    gap = min(gaps, key=lambda each: each.distance)
    ranked = sorted(gap.live, key=lambda name: -gap.live[name].drift)
    loud = [name for name in ranked if gap.live[name].drift > gap.live[name].noise(gap.images)]
    worst = [name for name in loud if gap.live[name].drift > gap.live[loud[0]].drift / 2]
    if not worst:
        yield Lacking("training batches of enough images to tell their noise from a fault")
    else:
        agreement = "" if gap.agreement is None else f", {gap.agreement:.0%} of {gap.images} images of equal class"
        yield Trouble(
            tuple(worst),
            f"distance of the predictions {gap.distance:.2f}{agreement}, and no less in {len(gaps) - 1} other batches; "
            f"{worst[0]} is off by {gap.live[worst[0]].drift:.2g} standard deviations",
            "bnf.precise_bn(model, loader, num_batches=min(len(loader), 100))",
        )


@rule(
    "BN203",
    "fixed statistics of another domain",
    "warning",
    why="Each channel leaves the layer shifted and scaled against what the weights that follow were trained on.",
    needs=("trace",),
)
def foreign_statistics(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** Freezing hurts; a frozen backbone is much worse than a live one.

    **Cause.** Statistics of the source domain normalise images of another: other sensors, colours, contrast.

    **Found by.** The last watched batches of 8 or more images, up to four: layers that trained with fixed statistics
    and whose inputs are off by more than 0.75 standard deviations in each (Wasserstein distance, root mean square over
    channels weighed by weight squared), beyond what so few images vary by themselves. The first BN layer of the network
    must be off as well, by more than 0.25, in the first batch before any update: what is off later or deeper only was
    moved by training, as weights before it learn, and the weights after it learn along. So a watch that begins
    when the optimizer has made steps already judges only a network whose other layers stand still.

    ```python
    bnf.freeze_bn(model)                                                       # the pitfall, on shifted images

    bnf.precise_bn(model, loader, num_batches=100, include_frozen=True)        # repaired: frozen at target statistics
    ```
    """
    assert isinstance(case.trace, Trace)
    gaps = [gap for gap in case.trace.gaps if gap.images >= FEW_IMAGES]
    fixed = [name for name, calls in case.trace.layers.items() if not calls.updating and case.is_fixed(name)]
    if not fixed:
        return
    if not gaps:
        yield Lacking(f"no training batch of {FEW_IMAGES} images" if case.trace.gaps else case.trace.no_gap)
        return
    if not case.trace.from_start and not trains_only_head(case):
        yield Lacking("no first step: the watch began when the weights had moved already")
        return
    seen = {name: [gap.layers[name].drift for gap in gaps if name in gap.layers] for name in fixed}
    off = {name: min(drifts) for name, drifts in seen.items() if drifts and min(drifts) > FOREIGN}
    if off and _from_the_start(case.trace):
        worst = max(off, key=lambda name: off[name])
        yield Trouble(
            tuple(off),
            f"{worst} is off by {off[worst]:.2g} standard deviations, {len(off)} layers by more than {FOREIGN}",
            "bnf.precise_bn(model, loader, num_batches=min(len(loader), 100), include_frozen=True)",
            "recalibrate.at=[start]",
        )


def _from_the_start(trace: Trace) -> bool:
    """Whether the images themselves are off, and not only what layers that learn have made of them."""
    first = trace.first_inputs
    return first is not None and first.drift > FITS and first.is_sure


@rule(
    "BN204",
    "test-time adaptation collapses",
    "warning",
    why="Minimising entropy for too long is easiest by predicting one class for everything.",
    needs=("trace",),
)
def collapsing_adaptation(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** Accuracy rises, then falls below that of the unadapted model over repeated passes.

    **Cause.** Only BN weights and biases learn, from the model's own predictions, with too high a rate, too small
    batches, or too many passes.

    **Found by.** Where only BN parameters train: one class takes over 80 % of the predictions in the last third of the
    watched forwards, at least half more than in the first tenth (16 images or more in each), and more than chance would
    move it between images drawn alike: Fisher's exact test at 1 %, over all classes. A stream that is sorted by class
    looks the same; so this is no error.

    ```python
    for _ in range(20):                                                # the pitfall: pass after pass
        adapt_by_entropy(model, optimizer)

    bnf.apply_policy(model, bnf.BNPolicy(eval_stats="mix", affine="frozen"))   # repaired: statistics only
    ```
    """
    assert isinstance(case.trace, Trace)
    seen = [(each.part, each.predicted) for each in case.trace.forwards if each.predicted is not None]
    counts = [predicted for part, predicted in seen if part == seen[0][0]]
    if len(counts) < 6 or sum(int(each.sum()) for each in counts) < 3 * _SAMPLE:
        if case.trace.adapts:
            yield Lacking(f"fewer than 6 forwards, or {3 * _SAMPLE} images, of which classes are predicted")
        return
    first, last = _counted(counts, 0.1), _counted(counts[::-1], 1 / 3)
    before, after = float(first.max() / first.sum()), float(last.max() / last.sum())
    if after > max(_COLLAPSED, 1.5 * before) and _chance_of_more(first, last) < FALSE_ALARMS:
        adapted = [
            n for n, layer in case.layers.items() if any(p.requires_grad for p in layer.parameters(recurse=False))
        ]
        yield Trouble(
            tuple(adapted),
            f"the commonest class went from {before:.0%} to {after:.0%} of the predictions",
            case.policy(adapted, 'eval_stats="mix"', 'affine="frozen"') + "  # from the unadapted weights",
        )


def _counted(counts: list[torch.Tensor], share: float) -> torch.Tensor:
    """How often each class is predicted in this share of the forwards, the first ones, or in more if these are few."""
    number, total = 0, torch.zeros_like(counts[0])
    while number < share * len(counts) or int(total.sum()) < _SAMPLE:
        total, number = total + counts[number], number + 1
    return total.double().cpu()


def _chance_of_more(first: torch.Tensor, last: torch.Tensor) -> float:
    """Probability that the last's commonest class is so much commoner by chance (Fisher), times the classes seen."""
    from scipy.stats import hypergeom  # not at the start: few need it

    most = int(last.argmax())
    both = first + last
    chance = hypergeom.sf(int(last[most]) - 1, int(both.sum()), int(both[most]), int(last.sum()))
    return float(chance) * int((both > 0).sum())


@rule(
    "BN209",
    "inputs of different kinds share one set of statistics",
    "warning",
    why="Each kind is normalised by itself in training and by a mixture, or by the last kind, in evaluation.",
    needs=("trace",),
)
def mixed_domains(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** Instability; evaluation follows the last forward; adversarial copies spoil clean accuracy.

    **Cause.** Several forwards per step, of source and target, of clean and adversarial images, update the same
    running statistics.

    **Found by.** In 3 or more watched steps of different images, 12 or more at each place, forwards at different places
    in the step whose input means differ by more than a quarter of a standard deviation, beyond chance by Student's t
    over steps and over images, at a rate of false alarms of at most 1 % for a whole watch (Bonferroni over channels and
    places).

    ```python
    loss = criterion(model(clean), labels) + criterion(model(adversarial), labels)     # the pitfall

    bnf.apply_policy(model, bnf.BNPolicy(domains="adversarial"))                       # repaired
    with bnf.domain(model, "adversarial"):
        loss = loss + criterion(model(adversarial), labels)
    ```
    """
    assert isinstance(case.trace, Trace)
    by_domain: defaultdict[tuple[str, str | None], list[list[Forward]]] = defaultdict(list)
    for group in case.trace.updates():
        described = [each for each in group if each.updated and each.mean is not None]
        for domain in dict.fromkeys((each.part, each.domain) for each in described):
            by_domain[domain].append([each for each in described if (each.part, each.domain) == domain])
    whole = [kept for steps in by_domain.values() if (kept := _whole_steps(steps))]
    judged = [steps for steps in whole if _is_enough(steps)]
    if len(judged) < len(whole):
        yield Lacking(f"fewer than 3 steps of several forwards, with {ENOUGH_SAMPLES} images at each place")
    tests = sum(len(steps[0]) - 1 for steps in judged)
    offsets = [
        (_offset(steps, place, FALSE_ALARMS / tests), place) for steps in judged for place in range(1, len(steps[0]))
    ]
    offset, place = max(offsets, default=(0.0, 0))
    if offset > 0.25:
        updating = tuple(name for name, calls in case.trace.layers.items() if calls.updating)
        yield Trouble(
            updating,
            f"inputs of forward {place + 1} of each step are off from the first's by {offset:.2f} standard deviations",
            "with bnf.domain(bnf.apply_policy(model, bnf.BNPolicy(domains='new')), 'new'): output = model(second)",
        )


def _whole_steps(steps: list[list[Forward]]) -> list[list[Forward]]:
    """Steps of as many forwards as any, each of new images; none where a step has one forward."""
    places = max(map(len, steps))
    whole = [group for group in steps if len(group) == places > 1]
    return [group for index, group in enumerate(whole) if not any(_is_repeated(group, old) for old in whole[:index])]


def _is_repeated(group: list[Forward], old: list[Forward]) -> bool:
    """Whether a step starts with the images of another: one batch over and over tells nothing about others."""
    first, other = group[0].fingerprint, old[0].fingerprint
    return first is not None and other is not None and first.shape == other.shape and torch.equal(first, other)


def _is_enough(steps: list[list[Forward]]) -> bool:
    return len(steps) >= 3 and all(
        sum(each.images for each in place) >= ENOUGH_SAMPLES for place in zip(*steps, strict=True)
    )


def _offset(steps: list[list[Forward]], place: int, rate: float) -> float:
    """Distance of the input means at a place of the step from those at the first, beyond chance; else 0.

    Where the images are drawn alike, the differences of the two means have the expectation 0 in each channel. They must
    be too far off for chance by two measures, of which each alone holds the rate for normal means: how steps differ,
    which knows that the images of a batch may have much in common, and how images differ, which few steps that agree by
    luck do not deceive.
    """
    first, other = (_place(steps, at) for at in (0, place))
    if first is None or other is None or first.means.shape != other.means.shape:
        return 0.0
    apart = other.means - first.means
    distance, count = apart.mean(0).abs(), len(steps)
    by_steps = _chances(distance, apart.var(0) / count, count - 1)
    pooled = (first.squares + other.squares) / (first.images + other.images - 2)
    by_images = _chances(distance, pooled * (1 / first.images + 1 / other.images), first.images + other.images - 2)
    sure = torch.maximum(by_steps, by_images) < rate / len(distance)
    return float((distance / first.spread)[sure].max()) if sure.any() else 0.0


class _Place(NamedTuple):
    """One place of the step over all steps, per channel.

    Attributes:
        means: (steps, C), of the input.
        squares: (C,), squared deviations of the images' means from their common mean.
        spread: (C,), standard deviation of the input.
        images: in all steps.
    """

    means: torch.Tensor
    squares: torch.Tensor
    spread: torch.Tensor
    images: int


def _place(steps: list[list[Forward]], place: int) -> _Place | None:
    """What the forwards at one place saw; None if their inputs have no channels in common."""
    seen = [group[place] for group in steps]
    columns = [[getattr(each, key) for each in seen] for key in ("mean", "between", "std")]
    if any(value is None or value.shape != columns[0][0].shape for column in columns for value in column):
        return None
    means, between, stds = (torch.stack(column).double().cpu() for column in columns)
    counts = torch.tensor([each.images for each in seen], dtype=torch.float64)[:, None]
    common = (counts * means).sum(0) / counts.sum()
    squares = (counts * (between + (means - common).square())).sum(0)
    return _Place(means, squares, stds.mean(0).clamp(min=1e-6), int(counts.sum()))


def _chances(distance: torch.Tensor, variance: torch.Tensor, freedom: int) -> torch.Tensor:
    """Probability of distances at least so large by chance (Student's t), for the squares of their standard errors."""
    from scipy.special import stdtr  # not at the start: few need it

    scores = distance / variance.sqrt().clamp(min=1e-12)
    return torch.from_numpy(2 * stdtr(freedom, -scores.abs().double().numpy()))
