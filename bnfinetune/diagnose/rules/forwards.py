"""Rules about forwards that one does not think of: recomputed, repeated, by a teacher, in the wrong mode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.facts import trains_only_head
from bnfinetune.diagnose.registry import Lacking, Trouble, rule
from bnfinetune.diagnose.trace import Forward, Trace


@rule(
    "BN301",
    "gradient checkpointing updates the statistics twice",
    "error",
    why="Recomputing a block in backward counts its batch again, so that momentum is in truth 1 - (1 - m)^2.",
    needs=("trace",),
)
def updated_in_recompute(case: Case) -> Iterator[Trouble]:
    """**Symptom.** The same losses as without checkpointing, but another evaluation.

    **Cause.** Activation checkpointing runs the forward of a block a second time inside backward, and BN in training
    mode updates its running statistics in that run too.

    **Found by.** Calls of BN layers in training mode inside a backward pass that update statistics.

    ```python
    model.set_grad_checkpointing(True)                                          # the pitfall with ordinary BN

    bnf.apply_policy(model, bnf.BNPolicy(update_stats="ema"))                   # repaired: recomputation never updates
    ```
    """
    assert isinstance(case.trace, Trace)
    twice = {name: calls for name, calls in case.trace.layers.items() if calls.recomputed}
    if twice:
        calls = next(iter(twice.values()))
        yield Trouble(
            tuple(twice),
            f"{calls.updating} forwards and {calls.recomputed} recomputations in backward updated the statistics",
            case.policy(twice, 'update_stats="ema"'),
            "bn.update_stats=ema",
        )


@rule(
    "BN302",
    "the same images update the statistics more than once per step",
    "warning",
    why="The running statistics forget faster than momentum says, and follow weights that the step takes back.",
    needs=("trace",),
)
def repeated_batch(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Statistics move faster than momentum says; with SAM, evaluation is noisier than training.

    **Cause.** A second pass over the same batch within a step: sharpness-aware minimisation, a second loss, a
    learning-rate finder.

    **Found by.** Within one optimizer update, two training forwards of equal images that both update.

    ```python
    first_loss = criterion(model(images), labels)             # updates the statistics
    second_loss = criterion(model(images), labels)            # the pitfall: updates them again

    with bnf.no_stat_updates(model):                          # repaired
        second_loss = criterion(model(images), labels)
    ```
    """
    assert isinstance(case.trace, Trace)
    repeats = sum(_repeats([each for each in group if each.updated]) for group in case.trace.updates())
    if repeats:
        updating = tuple(name for name, calls in case.trace.layers.items() if calls.updating)
        yield Trouble(
            updating,
            f"{repeats} forwards in {case.trace.steps} steps repeated a batch of the same step",
            "with bnf.no_stat_updates(model): output = model(images)",
        )


def _repeats(forwards: list[Forward]) -> int:
    prints = [(each.part, each.fingerprint) for each in forwards if each.fingerprint is not None]
    return sum(
        any(part == other and a.shape == b.shape and torch.equal(a, b) for other, b in prints[:index])
        for index, (part, a) in enumerate(prints)
    )


@rule(
    "BN303",
    "a teacher's statistics drift",
    "error",
    why="no_grad stops gradients, not updates: a teacher in training mode changes with every step.",
    needs=("trace",),
)
def drifting_teacher(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Distillation targets change although the teacher does not train.

    **Cause.** The teacher is a child of the student or of a common module, so `train()` reaches it. Neither `no_grad`
    nor `inference_mode` stops updates.

    **Found by.** Layers that updated their statistics, and only ever without gradients, while others trained.

    ```python
    pair = nn.ModuleDict({"student": student, "teacher": teacher}).train()      # the pitfall

    bnf.freeze_bn(pair, layers="teacher.*")                                     # repaired: holds through train()
    ```
    """
    assert isinstance(case.trace, Trace)
    calls = case.trace.layers
    if any(each.updating for each in calls.values()):
        taught = {name: each.silent for name, each in calls.items() if each.silent and not each.normalised}
        if taught:
            yield Trouble(
                tuple(taught),
                f"{len(taught)} layers updated their statistics {max(taught.values())} times, never with gradients",
                case.call("freeze_bn", taught),
            )


@rule(
    "BN304",
    "the mode leaks around validation",
    "error",
    why="Validation in training mode writes its data into the statistics; training in evaluation mode stops them.",
    needs=("trace",),
)
def leaking_mode(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** Validation changes the model; or training becomes silently different after the first validation.

    **Cause.** `model.eval()` before validation, or `model.train()` after it, is missing. (Repairing this has changed
    published results once: note what yours were measured with.)

    **Found by.** Layers that train and were also updated without gradients; training forwards in evaluation mode after
    ones in training mode. Re-estimation with momentum None is left alone, and so are forwards after a schedule-free
    `optimizer.eval()` that an evaluation in evaluation mode follows.

    ```python
    with torch.no_grad():
        validate(model)                    # the pitfall: in training mode

    model.eval()                           # repaired
    with torch.no_grad():
        validate(model)
    model.train()
    ```
    """
    assert isinstance(case.trace, Trace)
    calls = case.trace.layers
    trains = any(each.updating for each in calls.values())
    silent = {name: each.silent + each.averaged for name, each in calls.items()}
    leaking = {name: count for name, count in silent.items() if count and (calls[name].normalised or not trains)}
    if leaking:
        yield Trouble(
            tuple(leaking),
            f"{len(leaking)} layers in training mode updated their statistics {max(leaking.values())} times without "
            "gradients",
            "model.eval()  # before validation",
        )
    stuck = _stuck(case.trace)
    if stuck:
        yield Trouble(
            tuple(name for name, each in calls.items() if each.updating),
            f"{stuck} forwards with backward ran in evaluation mode after training had begun in training mode",
            "model.train()  # after validation",
        )
    if not (leaking or stuck or case.trace.evaluated):
        yield Lacking("no evaluation batch")


def _stuck(trace: Trace) -> int:
    """Forwards that were learnt from in evaluation mode, after others of the same part in training mode."""
    modes: defaultdict[str, list[bool]] = defaultdict(list)
    for each in trace.forwards:
        if each.grad and each.backwards:
            modes[each.part].append(each.training)
    return sum(len(seen) - seen.index(True) - sum(seen) for seen in modes.values() if True in seen)


@rule(
    "BN305",
    "a fixed encoder with live statistics",
    "error",
    why="Nothing in the encoder learns, yet its features change with the batch and from epoch to epoch.",
)
def live_encoder(case: Case) -> Iterator[Trouble]:
    """**Symptom.** The score of a linear probe is not the encoder's; cached features do not fit later ones.

    **Cause.** All parameters but the head's are frozen, and `train()` leaves BN in training mode.

    **Found by.** No parameter outside the classifier trains, while BN layers before it will normalise by the batch or
    update.

    ```python
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("fc")        # the pitfall: BN is live

    bnf.freeze_bn(model)                                       # repaired
    ```
    """
    if not trains_only_head(case):
        return
    extracting = case.optimizer is None and not case.bare.training
    live = [n for n, layer in case.layers.items() if id(layer) not in case.head and case.updates(n)]
    if live and not extracting:
        yield Trouble(
            tuple(live),
            f"{len(live)} layers update their statistics, and no parameter outside the classifier trains",
            case.call("freeze_bn", live),
            "bn.train_stats=running bn.update_stats=none bn.affine=frozen",
        )
