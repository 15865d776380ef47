"""One fine-tuning run, from a recipe to a folder with the best network and what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from rich.console import Console
from torch import nn

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.diagnose.finding import Findings, render
from bnfinetune.diagnose.set_up import check_set_up
from bnfinetune.errors import PolicyError, SelectionError
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import dump_recipe, load_recipe
from bnfinetune.training.data.from_recipe import recipe_loaders
from bnfinetune.training.data.splits import ImageSplits, load_splits
from bnfinetune.training.keeper import Keeper
from bnfinetune.training.launch import lost_ranks, seed_ranks, start_accelerator
from bnfinetune.training.loop.memory import enough_memory
from bnfinetune.training.loop.phases import apply_recipe_policies
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.measuring.metrics import Metrics
from bnfinetune.training.network.backbone import build_backbone, input_config, restrict_training
from bnfinetune.training.network.norms import convert_recipe_norms
from bnfinetune.training.network.optim import describe_groups
from bnfinetune.training.network.shapes import smallest_batch
from bnfinetune.training.probe.features import features_instead_of_images
from bnfinetune.training.saving.lock import RunLock
from bnfinetune.training.saving.resume import choose_run


@dataclass(frozen=True)
class RunResult:
    """What a run gave. `before` and `after` map `validation`, and `test` where there is one, to metrics."""

    folder: Path
    recipe: Recipe
    before: dict[str, Metrics]
    after: dict[str, Metrics]
    model: nn.Module = field(repr=False)  # the bare network with the best weights
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)


def finetune(recipe: str | Mapping[str, Any] | Recipe, /, **overrides: Any) -> RunResult:
    """Fine-tune as `bnfinetune recipe=... [overrides]` does.

    Args:
        recipe: The name of a shipped recipe, the path of a YAML file, a nested mapping, or a `Recipe`.
        overrides: Values that differ, under dotted keys (`**{"optim.lr": 1e-3}`) or as nested mappings (`optim={...}`).

    Returns:
        The measured accuracies, the run folder and the network.

    Raises:
        BnFinetuneError: One of its children, with one line that names the key or file and the remedy.
    """
    return train(load_recipe(recipe, overrides))


def train(recipe: Recipe) -> RunResult:
    """Run a complete recipe; `finetune` is the same for names and overrides.

    Raises:
        BnFinetuneError: As `finetune`.
        SystemExit: SIGTERM came during training, with code 143, after a state was saved.
        KeyboardInterrupt: Ctrl-C came; during training, after a state was saved.
    """
    minutes = recipe.train.timeout_minutes
    accelerator = start_accelerator(recipe.train.mixed_precision, recipe.run.tracking, minutes)
    setting = f"train.batch_size={recipe.train.batch_size}, evaluate.batch_size={recipe.evaluate.batch_size}"
    with RunLock() as lock, lost_ranks(minutes), enough_memory(accelerator.device, setting, "lower them"):
        return _train(recipe, accelerator, lock)


def _train(recipe: Recipe, accelerator: Accelerator, lock: RunLock) -> RunResult:
    say = Console(quiet=not accelerator.is_main_process, highlight=False, soft_wrap=True).print
    folder = choose_run(recipe, accelerator, lock)
    trainer, splits, data_config, dropped = assemble(recipe, accelerator, say)

    seed_ranks(recipe.run, same_on_all=False)
    source = {
        "computed": "as stored and trained",
        "source": recipe.data.source,
        "fingerprint": splits.fingerprint(),
        "levels": dict(splits.levels),
    }
    unreadable = dict.fromkeys(splits.skipped)
    keeper = Keeper(
        trainer, folder, dump_recipe(recipe), splits.class_names, data_config, source, say, lock, unreadable
    )
    with closing(trainer.loaders):
        found = judge(trainer)
        before = keeper.begin([*headline(trainer, splits, dropped), *told(found)], found)
        with features_instead_of_images(trainer, keeper.splits, source["fingerprint"], say):
            trainer.fit(keeper.pause)
        best, after = keeper.finish()
    return RunResult(folder.path, recipe, before, after, best, keeper.history)


class Assembly(NamedTuple):
    """What a recipe comes to before its first update.

    Attributes:
        trainer: Network under its policies, loaders, optimizer and loop.
        splits: The images.
        data_config: timm's description of what the network takes.
        dropped: Training images that each epoch leaves out, too few for a batch that BN can normalise.
    """

    trainer: Trainer
    splits: ImageSplits
    data_config: dict[str, Any]
    dropped: int


def assemble(recipe: Recipe, accelerator: Accelerator, say: Callable[[str], None]) -> Assembly:
    """Load and build all that a recipe names; nothing is written.

    Args:
        recipe: The recipe.
        accelerator: The device and ranks, from `start_accelerator`.
        say: Told what a change of norm layers did to the network.

    Raises:
        BnFinetuneError: Its network or data cannot be used.
    """
    splits = load_splits(recipe.data, recipe.run.seed)
    seed_ranks(recipe.run, same_on_all=True)
    model = build_backbone(recipe.model, splits.class_names)
    restrict_training(model, recipe.model.trainable)
    data_config = input_config(model, recipe.data.image_size)
    loaders = recipe_loaders(recipe, splits, data_config, accelerator)
    convert_recipe_norms(model, recipe.model, loaders, say)
    apply_recipe_policies(model, recipe, loaders.train.batches)
    least = smallest_batch(model, data_config["input_size"], recipe.train.batch_size, loaders.train.rarest_share)
    dropped = loaders.train.drop_remainder(least)
    trainer = Trainer(recipe, accelerator, model, loaders, len(splits.class_names))
    return Assembly(trainer, splits, data_config, dropped)


def judge(trainer: Trainer) -> Findings:
    """What the doctor finds in the set-up, as far as `run.check` asks.

    Raises:
        PolicyError: `run.check=error`, and a finding is an error.
    """
    recipe = trainer.recipe
    if recipe.run.check == "off":
        return Findings()
    ranks = trainer.accelerator.num_processes
    found = check_set_up(recipe, trainer.model, trainer.optimizer, updates=trainer.updates, ranks=ranks)
    errors = Findings(finding for finding in found if finding.severity == "error")
    if recipe.run.check == "error" and errors:
        raise PolicyError(f"run.check=error: {render(errors, 'lines').splitlines()[0]}")
    return found


def told(findings: Findings) -> list[str]:
    """Findings, a line each."""
    return [f"check  {line}" for line in render(findings, "lines").splitlines()]


def headline(trainer: Trainer, splits: ImageSplits, dropped: int) -> list[str]:
    """What is about to be trained, in a few lines: network, data, BN layers, optimizer groups."""
    recipe = trainer.recipe
    weights = recipe.model.checkpoint or ("pretrained" if recipe.model.pretrained else "random weights")
    length = f"{recipe.train.steps} updates" if recipe.train.steps else f"{recipe.train.epochs} epochs"
    ranks = trainer.accelerator.num_processes
    batch = " x ".join(str(n) for n in (ranks, recipe.train.batch_size, recipe.train.grad_accum) if n > 1) or "1"
    return [
        f"[bold]{recipe.name}[/]  {recipe.model.name} ({weights}), {length}, batches of {batch}",
        f"data   {splits.describe()}",
        *(
            [f"       each epoch leaves out {dropped} images, too few for a batch that BN can normalise"]
            if dropped
            else []
        ),
        f"BN     {summarise_bn(trainer.model)}",
        *([f"       {folded}"] if (folded := trainer.folding.describe()) else []),
        *(f"       after update {phase.update}: {phase}" for phase in trainer.phases),
        *(f"group  {line}" for line in describe_groups(trainer.optimizer.param_groups)),
    ]


def summarise_bn(model: nn.Module) -> str:
    """How many BN layers do what, such as `9 layers: statistics running (fixed), affine frozen`."""
    try:
        layers = find_bn_layers(model).values()
    except SelectionError:
        return "no BatchNorm layer"
    kinds = Counter(switches_of(layer) for layer in layers)
    return "; ".join(
        f"{count} layers: normalised by {kind.train_stats} statistics in training, updated by {kind.update_stats}, "
        f"affine {kind.affine}"
        for kind, count in kinds.most_common()
    )
