"""Rules about freezing by hand: what a freeze leaves moving."""

from __future__ import annotations

from collections.abc import Iterator

from bnfinetune.bn.policy.switched_layer import state_of, trainable
from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.facts import trains_only_head
from bnfinetune.diagnose.registry import Trouble, rule
from bnfinetune.diagnose.trace import Trace

_FREEZE = "bn.train_stats=running bn.update_stats=none"


@rule(
    "BN101",
    "train() undid the freeze",
    "error",
    why="Layers that were put in evaluation mode normalise by the batch again and move their statistics.",
    needs=("trace",),
)
def undone_by_train(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Statistics of "frozen" layers move again from the second epoch on.

    **Cause.** Evaluation mode was set once; `model.train()` recurses into every child and sets it back.

    **Found by.** A BN layer that stood in evaluation mode while the model trained, and later normalised by the batch.

    ```python
    for layer in bnf.find_bn_layers(model).values():
        layer.eval()                    # the pitfall: holds until the next model.train()

    bnf.freeze_bn(model, affine=False)  # repaired: holds through train()
    ```
    """
    assert isinstance(case.trace, Trace)
    undone = {name: calls.unfrozen for name, calls in case.trace.layers.items() if calls.unfrozen}
    if undone:
        yield Trouble(
            tuple(undone),
            f"{len(undone)} layers were in evaluation mode and then updated their statistics "
            f"{max(undone.values())} times",
            case.call("freeze_bn", undone, "affine=False"),
            f"{_FREEZE}",
        )


@rule(
    "BN102",
    "weight and bias are frozen, but the statistics move",
    "error",
    why="requires_grad does not reach buffers: in training mode the layer follows the batch, and its features drift.",
)
def statistics_drift(case: Case) -> Iterator[Trouble]:
    """**Symptom.** A "frozen" backbone gives other features after each epoch; results cannot be repeated.

    **Cause.** `requires_grad = False` stops gradients only. Running statistics are buffers, and training mode updates
    them whatever `requires_grad` says.

    **Found by.** BN layers without a trainable weight or bias that will be in training mode and update. Layers whose
    policy says exactly that are left alone.

    ```python
    for parameter in model.layer1.parameters():
        parameter.requires_grad = False           # the pitfall: buffers ignore it

    bnf.freeze_bn(model, layers="layer1.*")       # repaired
    ```
    """
    if trains_only_head(case):
        return  # BN305 says it better
    drifting = [
        name
        for name, layer in case.layers.items()
        if case.is_native(name) and case.updates(name) and layer.weight is not None and not any(trainable(layer))
    ]
    if drifting:
        yield Trouble(
            tuple(drifting),
            f"{len(drifting)} layers train neither weight nor bias and still update their statistics",
            case.call("freeze_bn", drifting),
            f"{_FREEZE} bn.affine=frozen",
        )


@rule(
    "BN103",
    "half a freeze",
    "info",
    why="Statistics and weights are two switches; here one is off and the other on, by the means that hide which.",
)
def half_freeze(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Statistics stay fixed while weight and bias learn, or a weight is frozen and its bias learns.

    **Cause.** Evaluation mode and `requires_grad` are two switches, often set under the one name "freeze".

    **Found by.** Ordinary layers in evaluation mode with a trainable weight or bias inside a model in training mode,
    and layers of which only one of weight and bias is trainable. A policy that says so is not reported.

    ```python
    model.bn1.eval()                                     # the pitfall: bn1.weight still learns

    bnf.freeze_bn(model, layers="bn1", affine=False)     # repaired: says what it means, and holds
    bnf.freeze_bn(model, layers="bn1")                   # or freezes both
    ```
    """
    fixed = [name for name in case.layers if case.set_apart(name) and any(trainable(case.layers[name]))]
    if fixed:
        yield Trouble(
            tuple(fixed),
            f"{len(fixed)} layers in evaluation mode have fixed statistics, but their weight and bias learn",
            case.call("freeze_bn", fixed, "affine=False"),
            _FREEZE,
        )
    uneven = [name for name, layer in case.layers.items() if set(trainable(layer)) == {True, False}]
    if uneven:
        yield Trouble(
            tuple(uneven),
            f"{len(uneven)} layers train only one of weight and bias",
            case.policy(uneven, 'affine="trained"'),
            "bn.affine=trained",
        )


@rule(
    "BN104",
    "track_running_stats was switched off after construction",
    "error",
    why="Training now normalises by the batch and leaves the buffers behind; evaluation still uses these old ones.",
)
def tracking_switched_off(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Training goes well; evaluation is shifted, as if the model had another input.

    **Cause.** With the flag off but buffers present, PyTorch normalises by the batch in training and by the old
    buffers in evaluation. Some freezing helpers set the flag and call it frozen.

    **Found by.** `track_running_stats` is False although `running_mean` exists.

    ```python
    model.bn1.track_running_stats = False     # the pitfall

    bnf.freeze_bn(model, layers="bn1")        # repaired: the buffers normalise in training too
    ```
    """
    flipped = [
        name
        for name, layer in case.layers.items()
        if case.is_native(name) and layer.running_mean is not None and not getattr(layer, "track_running_stats", True)
    ]
    if flipped:
        yield Trouble(
            tuple(flipped),
            f"{len(flipped)} layers hold running statistics that training neither uses nor updates",
            case.call("freeze_bn", flipped, "affine=False"),
            _FREEZE,
        )


@rule(
    "BN105",
    "running statistics are missing",
    "warning",
    why="Without them evaluation normalises by its own batch: predictions depend on the other images in it.",
)
def no_running_statistics(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Predictions change with the other images of the batch; a batch of one fails; exports train.

    **Cause.** `running_mean` was set to None, or the layer built with `track_running_stats=False`, often as a cure for
    bad evaluation. Re-estimating the statistics cures that without this price.

    **Found by.** `running_mean is None`.

    ```python
    model.bn1.running_mean = model.bn1.running_var = None     # the pitfall
    ```

    The fix gives the layers buffers again; `bnf.precise_bn(model, loader)` then fills them.
    """
    without = [name for name, layer in case.layers.items() if layer.running_mean is None]
    if without:
        names = "bnf.find_bn_layers(model)"
        yield Trouble(
            tuple(without),
            f"{len(without)} layers keep no running mean and variance",
            f"for name in {without!r}: n = (l := {names}[name]).num_features; "
            "l.__init__(n, eps=l.eps, momentum=l.momentum, affine=l.affine)",
        )


@rule(
    "BN106",
    "an unusual momentum",
    "warning",
    why="Momentum only weighs the newest batch in the running statistics, and does not decide what normalises.",
)
def unusual_momentum(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Buffers stay constant and evaluation is poor (0), follow the last batch (above 0.5), or hardly move
    late in training (None).

    **Cause.** `momentum = 0` is taken for a freeze, but training still normalises by the batch. None means the
    cumulative average over all batches ever seen, and is also what an interrupted re-estimation may leave behind.
    TensorFlow's momentum is the complement of PyTorch's: its 0.99 is 0.01 here.

    **Found by.** Layers that normalise by the batch with momentum 0, above 0.5, or None without a policy that says
    `cumulative`.

    ```python
    model.bn1.momentum = 0.0                  # the pitfall

    bnf.freeze_bn(model, layers="bn1")        # repaired
    ```
    """
    live = [n for n in case.layers if case.normalises_by_batch(n) and case.switches[n].update_stats != "none"]
    still = [name for name in live if case.layers[name].momentum == 0]
    if still:
        yield Trouble(
            tuple(still),
            f"{len(still)} layers with momentum 0 normalise by the batch and never learn its statistics",
            case.call("freeze_bn", still, "affine=False"),
            f"{_FREEZE} bn.momentum=null",
        )
    hasty = [name for name in live if (case.layers[name].momentum or 0) > 0.5]
    averaging = [name for name in live if case.layers[name].momentum is None and case.is_native(name)]
    for names, found in ((hasty, "momentum above 0.5"), (averaging, "momentum None, a cumulative average,")):
        if names:
            yield Trouble(
                tuple(names),
                f"{len(names)} layers with {found} (PyTorch's default is 0.1)",
                case.policy(names, 'update_stats="ema"', "momentum=0.1"),
                "bn.update_stats=ema bn.momentum=0.1",
            )


@rule(
    "BN113",
    "requires_grad undid the freeze of weight and bias",
    "error",
    why="A policy froze them; whoever set requires_grad since lets them learn again.",
)
def undone_by_requires_grad(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Weight and bias of layers that were frozen move, while their statistics stay.

    **Cause.** Code that switches whole networks, such as `model.requires_grad_(True)` in GAN loops and gradual
    unfreezing, sets every Parameter, those that a policy froze too.

    **Found by.** Layers whose affine a policy has frozen and of which a Parameter has `requires_grad`.

    ```python
    bnf.freeze_bn(model)
    model.requires_grad_(True)                           # the pitfall: weight and bias learn again

    bnf.freeze_bn(model, stats=False)                    # repaired; bnf.unfreeze_bn(model, stats=False) if it is meant
    ```
    """
    thawed = [
        name
        for name, layer in case.layers.items()
        if (state := state_of(layer)) is not None and state.affine_frozen and True in trainable(layer)
    ]
    if thawed:
        yield Trouble(
            tuple(thawed),
            f"a policy froze weight and bias of {len(thawed)} layers that learn again",
            case.call("freeze_bn", thawed, "stats=False"),
            "bn.affine=frozen",
        )
