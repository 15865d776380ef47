"""From a recipe to all that trains: network under its policies, loaders, optimizer, loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import nn

from bnfinetune.diagnose.finding import Findings, render
from bnfinetune.diagnose.set_up import check_set_up
from bnfinetune.errors import PolicyError, RecipeError
from bnfinetune.recipe import Model, Recipe
from bnfinetune.recipe_files import dump_recipe
from bnfinetune.training.data.from_recipe import recipe_loaders, recipe_splits
from bnfinetune.training.data.splits import ImageSplits
from bnfinetune.training.launch import on_main, seed_ranks
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.network.backbone import build_backbone, input_config, restrict_training
from bnfinetune.training.network.hub import cache_if_unreachable
from bnfinetune.training.network.norms import convert_recipe_norms, norm_config
from bnfinetune.training.network.optim import with_rate
from bnfinetune.training.network.policies import apply_recipe_policies
from bnfinetune.training.network.shapes import set_format, smallest_batch
from bnfinetune.training.saving.run_folder import RunFolder
from bnfinetune.training.saving.timm_folder import save_timm_folder
from bnfinetune.training.stopwatch import Stopwatch


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

    def export(
        self, network: nn.Module, folder: RunFolder, statistics: dict[str, Any], thresholds: Sequence[float]
    ) -> None:
        """Write a network as the best of its run.

        Args:
            network: The bare network.
            folder: Of the run.
            statistics: Says where those of its BN layers come from.
            thresholds: Of `LabelMetrics`, chosen on validation; empty where an image has one class.
        """
        recipe = self.trainer.recipe
        source = statistics | {"update": self.trainer.progress.best_update}
        names, norms = self.splits.class_names, norm_config(recipe.model)
        save_timm_folder(folder.best, network, names, self.data_config, dump_recipe(recipe), source, norms, thresholds)


def assemble(
    recipe: Recipe, accelerator: Accelerator, say: Callable[[str], None], clock: Stopwatch | None = None
) -> Assembly:
    """Load and build all that a recipe names; nothing is written.

    Args:
        recipe: The recipe.
        accelerator: The device and ranks, from `start_accelerator`.
        say: Told what a change of norm layers did to the network.
        clock: Of the run that it is for.

    Raises:
        BnFinetuneError: Its network or data cannot be used.
        RecipeError: It compares others, and says of none of them that it is the one.
    """
    if recipe.auto.recipes:
        raise RecipeError(
            f"recipe={recipe.name} compares {', '.join(recipe.auto.recipes)}: name one of these, or train by "
            f"`bnfinetune recipe={recipe.name}`, which is bnf.finetune_auto in Python"
        )
    recipe = with_rate(recipe, accelerator.num_processes)
    splits = recipe_splits(recipe, accelerator)
    seed_ranks(recipe.run)
    model = on_main(accelerator, lambda: _backbone(recipe.model, splits.class_names))
    seed_ranks(recipe.run)  # only the first rank has drawn
    restrict_training(model, recipe.model.trainable)
    data_config = input_config(model, recipe.data.image_size)
    set_format(model, recipe.model.channels_last, data_config["input_size"], accelerator.device)
    loaders = recipe_loaders(recipe, splits, data_config, accelerator)
    convert_recipe_norms(model, recipe.model, loaders, say)
    apply_recipe_policies(model, recipe, loaders.train.batches)
    least = smallest_batch(model, data_config["input_size"], recipe.train.batch_size, loaders.train.rarest_share)
    dropped = loaders.train.drop_remainder(least)
    trainer = Trainer(recipe, accelerator, model, loaders, len(splits.class_names), clock or Stopwatch())
    return Assembly(trainer, splits, data_config, dropped)


def _backbone(section: Model, class_names: Sequence[str]) -> nn.Module:
    with cache_if_unreachable(section):
        return build_backbone(section, class_names)


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
