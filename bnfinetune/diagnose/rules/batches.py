"""Rules about what a mean and a variance are taken of: how many images, in which order, at which size."""

from __future__ import annotations

from collections.abc import Iterator

from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.loader_facts import (
    classes_per_batch,
    drops_last,
    images_per_pass,
    is_shuffled_subset,
    labels_of,
    reads_in_order,
    sampler_of,
)
from bnfinetune.diagnose.registry import Lacking, Trouble, rule

LEFTOVER = 0.05
"""Largest weight that the statistics from before training may keep."""

FEW_IMAGES = 8
"""Below this, fixing the statistics beats live ones (Wu & Johnson 2021, figure 6)."""

ENOUGH_IMAGES = 32
"""From here on, more images per batch change little (Wu & Johnson 2021, table 2)."""

CHOSEN_RATIO = 1.3
"""Up to here, a larger size in evaluation makes up for training crops, which show things larger (FixRes, table 1)."""


@rule(
    "BN202",
    "too few steps to warm the statistics",
    "warning",
    why="What evaluation uses is an average that still carries the statistics from before training.",
)
def too_few_steps(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** A huge evaluation loss early on, or on tiny sets at all times, although training goes well.

    **Cause.** After T updates with momentum m the old statistics keep the weight (1 - m)^T: with 0.1, 35 % after 10
    updates and 5 % after 29.

    **Found by.** This weight above 5 % at the end of the planned updates: `steps` times `grad_accum`.

    ```python
    bnf.check_bn(model, optimizer, loader, steps=10)            # the pitfall: 35 % are left

    bnf.apply_policy(model, bnf.BNPolicy(momentum=0.37))        # repaired: 1 % is left
    bnf.precise_bn(model, loader)                               # or: computed anew after training
    ```
    """
    if case.context.steps is None:
        yield Lacking("no number of steps")
        return
    updates = case.context.steps * case.context.grad_accum
    left = {n: (1 - m) ** updates for n in case.live if (m := getattr(case.layers[n], "momentum", None))}
    left = {name: weight for name, weight in left.items() if weight > LEFTOVER}
    if left:
        momentum = min(1 - 0.01 ** (1 / max(updates, 1)), 0.5)
        remedy = (
            case.policy(left, f"momentum={momentum:.3f}")
            if (1 - momentum) ** updates <= LEFTOVER
            else case.policy(left, 'update_stats="cumulative"')
        )
        yield Trouble(
            tuple(left),
            f"after {updates} updates the statistics from before still weigh {max(left.values()):.0%}",
            remedy,
            f"bn.momentum={momentum:.3f}",
        )


@rule(
    "BN205",
    "the last batch is too small for its statistics",
    "error",
    why="One value per channel has no variance: PyTorch stops at the end of the epoch, often on one process only.",
    needs=("loader",),
)
def last_batch(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** "Expected more than 1 value per channel when training", at the end of the first epoch.

    **Cause.** The number of images leaves one for the last batch, and a BN layer sees one value per image: it is 1d,
    or its feature map is 1 x 1.

    **Found by.** The remainder of the loader on this process, and the feature maps of `input_size` (or the model's
    own). `drop_last=True` for a set smaller than one batch is reported too: it leaves no batch at all.

    ```python
    loader = DataLoader(images, batch_size=8, shuffle=True)                   # the pitfall: 8 k + 1 images

    loader = DataLoader(images, batch_size=8, shuffle=True, drop_last=True)   # repaired
    bnf.freeze_bn(model, affine=False)                                        # or: no batch statistics at all
    ```
    """
    size, count, drops = case.batch_size, images_per_pass(case.loader), drops_last(case.loader)
    if size is None or count is None:
        yield Lacking("no known length or batch size of the loader")
        return
    if drops and count < size:
        yield Trouble(
            (),
            f"drop_last with {count} images and batches of {size} leaves no batch",
            _rebuilt_loader(case, drop_last=False),
        )
    left = count % size
    if drops or left != 1:
        return
    alone = [name for name in case.switches if case.normalises_by_batch(name) and case.sync_ranks(name) == 1]
    tight = tuple(name for name in alone if case.values_per_image.get(name, 2) == 1)
    if tight:
        yield Trouble(
            tight,
            f"{count} images in batches of {size} leave one, of which {len(tight)} layers see one value per channel",
            _rebuilt_loader(case, drop_last=True),
        )


@rule(
    "BN206",
    "few images per statistic",
    "warning",
    why="Mean and variance of a few images are noise, which training learns to rely on and evaluation does not have.",
)
def small_batch(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** Noisy, unstable metrics; evaluation behind training.

    **Cause.** Each process normalises by its own images, and there are few of them: detection, video, large images.

    **Found by.** Fewer than 8 images per statistic: batch size per process, times the processes that `sync` joins, or
    the ghost size. Wu and Johnson (2021, figure 6) found fixed statistics better below 8, level at 8, worse above 16.

    ```python
    loader = DataLoader(images, batch_size=2, shuffle=True)        # the pitfall

    bnf.freeze_bn(model, affine=False)                             # repaired: fixed statistics
    bnf.apply_policy(model, bnf.BNPolicy(train_stats="sync"))      # or, on many processes: joined batches
    ```
    """
    if case.batch_size is None:
        yield Lacking("no batch size")
        return
    few = {n: images for n in case.live if (images := case.images_per_statistic(n)) is not None and images < FEW_IMAGES}
    if few:
        joined = case.batch_size * case.ranks >= FEW_IMAGES
        yield Trouble(
            tuple(few),
            f"{min(few.values())} images per statistic ({case.batch_size} per process, {case.ranks} processes)",
            case.policy(few, 'train_stats="sync"') if joined else case.call("freeze_bn", few, "affine=False"),
            "bn.train_stats=sync" if joined else "bn.train_stats=running bn.update_stats=none",
        )


@rule(
    "BN207",
    "gradient accumulation does not enlarge BN's batch",
    "warning",
    why="Gradients see the large batch, but every statistic is still taken of one micro-batch and moves with each.",
)
def accumulation(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Worse results than with the real large batch.

    **Cause.** Accumulation adds up gradients. BN normalises within each forward, and updates its statistics once per
    micro-batch instead of once per step.

    **Found by.** `grad_accum` above 1 while layers normalise by fewer than 32 images.

    ```python
    bnf.check_bn(model, optimizer, loader, grad_accum=8)     # the pitfall: 8 x 4 images are no batch of 32 for BN

    bnf.freeze_bn(model, affine=False)                       # repaired
    ```
    """
    if case.context.grad_accum < 2:
        return
    small = {n: images for n in case.live if (images := case.images_per_statistic(n) or 0) < ENOUGH_IMAGES}
    if small:
        images = min(small.values())
        micro = f"{images} images" if images else "one micro-batch"
        yield Trouble(
            tuple(small),
            f"{case.context.grad_accum} micro-batches per step; statistics are taken of {micro} at a time",
            case.call("freeze_bn", small, "affine=False"),
            "bn.train_stats=running bn.update_stats=none",
        )


@rule(
    "BN208",
    "training reads the images in stored order",
    "error",
    why="Batches of one class have that class's statistics, and the running ones end up as those of the last block.",
    needs=("loader",),
)
def sorted_loader(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** Training loss falls at once, evaluation is at chance; statistics follow the last images.

    **Cause.** The training loader does not shuffle, and image folders are sorted by class. The same holds for the data
    of a re-estimation.

    **Found by.** A sequential sampler in the training loader, or a `DistributedSampler` that does not shuffle: the one
    in its `batch_sampler` where it has one, also below Accelerate's wrappers. Where the set tells its labels (`targets`
    or `labels`), only if its batches hold fewer than half of the classes that shuffled ones would. Streams, samplers of
    other kinds and parts drawn by `random_split` are left alone.

    ```python
    loader = DataLoader(images, batch_size=32)                    # the pitfall

    loader = DataLoader(images, batch_size=32, shuffle=True)      # repaired
    ```
    """
    sampler = sampler_of(case.loader)
    if sampler is None:
        yield Lacking("no known order of the loader")
        return
    if not reads_in_order(sampler) or not case.live or case.batch_size is None:
        return
    labels = labels_of(case.loader.dataset)
    if labels is None and is_shuffled_subset(case.loader.dataset):
        return
    if labels is None:
        measured = f"a {type(sampler).__name__} that does not shuffle; the set tells no labels"
    else:
        found, expected = classes_per_batch(labels, case.batch_size)
        if found >= expected / 2:
            return
        measured = f"a batch holds {found:.1f} classes on average; shuffled, it would hold {expected:.1f}"
    yield Trouble(tuple(case.live), measured, _rebuilt_loader(case, shuffle=True))


@rule(
    "BN210",
    "training and evaluation differ in image size",
    "warning",
    why="Activation statistics change with the size of what is seen, and evaluation uses those of the training size.",
    rewatched=True,
)
def other_resolution(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** Evaluating at another resolution than training costs accuracy, most of all with global pooling.

    **Cause.** Touvron et al. (2019, "Fixing the train-test resolution discrepancy"): apparent sizes and the statistics
    after pooling change with resolution.

    **Found by.** `train_size` against `eval_size`, or the sizes that watched forwards had in either mode, where
    statistics follow training: more than a tenth apart. Evaluation at up to 1.3 times the training size is left alone:
    random crops are enlarged in training, and reference recipes (176 and 224) make up for that on purpose.

    ```python
    bnf.check_bn(model, train_size=160, eval_size=224)      # the pitfall

    bnf.precise_bn(model, loader_at_224)                    # repaired: statistics at the size that is evaluated,
    bnf.freeze_bn(model, affine=False)                      # which the last epochs then train with
    ```

    After a run of this project, `recipe=fix_size` is the paper's own cure: at the evaluation size it computes the last
    layer's statistics anew and tunes its affine and the head.
    """
    train, evaluated = case.context.train_size, case.context.eval_size
    if case.trace is not None:
        train, evaluated = case.trace.sizes()
    if not (train and evaluated):
        yield Lacking(_missing_size(case, train))
        return
    if not _is_chosen(train, evaluated) and case.live:
        yield Trouble(
            tuple(case.live),
            f"trained at {train} and evaluated at {evaluated} pixels",
            "bnf.precise_bn(model, loader); bnf.freeze_bn(model, affine=False)  "
            f"# near the end of training, with a loader of {evaluated}-pixel images",
            f"data.image_size={evaluated}",
        )


def _missing_size(case: Case, train: int | None) -> str:
    if case.trace is None:
        return "no image sizes"
    return "no evaluation batch of images" if train else "no training batch of images"


def _is_chosen(train: int, evaluated: int) -> bool:
    """Whether two sizes are equal, or as far apart as recipes set them on purpose."""
    return abs(train - evaluated) <= 0.1 * evaluated or train < evaluated <= CHOSEN_RATIO * train


def _rebuilt_loader(case: Case, **changes: bool) -> str:
    arguments = {"shuffle": not reads_in_order(sampler_of(case.loader))} | changes
    given = ", ".join(f"{key}={value}" for key, value in arguments.items() if value)
    comma = ", " if given else ""
    return f"loader = torch.utils.data.DataLoader(loader.dataset, batch_size={case.batch_size}{comma}{given})"
