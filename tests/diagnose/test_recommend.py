"""Recommendations for planted situations; docs/checks/recommendations.md judges them by running the candidates."""

import pytest

from bnfinetune.diagnose.recommend import Situation, recommend
from bnfinetune.recipe_files import load_recipe, shipped_recipes

SITUATIONS = {
    "large batch, matched domain": (Situation(batch_size=32, training_images=5000), "full"),
    "large batch, shifted domain": (Situation(batch_size=32, training_images=5000, drift=2.0), "full"),
    "tiny batch, matched domain": (Situation(batch_size=2, training_images=5000), "freeze_stats"),
    "tiny batch, shifted domain": (Situation(batch_size=2, training_images=5000, drift=2.0), "precise_then_freeze"),
    "tiny batch, untrained": (Situation(batch_size=2, training_images=5000, untrained=True), "precise_then_freeze"),
    "tiny batch on many processes": (Situation(batch_size=2, ranks=16, training_images=5000), "sync_bn"),
    "tiny set": (Situation(batch_size=16, training_images=50), "bn_only"),
    "tiny set, shifted domain": (Situation(batch_size=16, training_images=50, drift=2.0), "bn_only"),
    "sorted loader": (Situation(batch_size=32, training_images=5000, sorted_batches=True), "bn_only"),
    "no labels": (Situation(batch_size=32, labelled=False, drift=2.0), "adabn"),
    "noisy layers": (Situation(batch_size=12, training_images=5000, smallest_sound_batch=64), "freeze_stats"),
    "quiet layers": (Situation(batch_size=12, training_images=5000, smallest_sound_batch=4), "full"),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_fits(name):
    situation, recipe = SITUATIONS[name]
    advice = recommend(situation)
    assert advice.recipe == recipe
    assert recipe in shipped_recipes()
    assert advice.reasons
    assert any(character.isdigit() for character in " ".join(advice.reasons)) or not situation.labelled
    load_recipe(advice.recipe, list(advice.overrides))  # every override is a key


@pytest.mark.parametrize("why", [{"training_images": 50}, {"training_images": 5000, "sorted_batches": True}])
def test_where_few_parameters_train_drift_is_mended_first(why):
    assert "recalibrate.at=[start]" in recommend(Situation(batch_size=16, drift=2.0, **why)).overrides
    assert "recalibrate.at=[start]" not in recommend(Situation(batch_size=16, drift=0.1, **why)).overrides


def test_the_command_can_be_pasted():
    advice = recommend(Situation(batch_size=16, training_images=50, drift=2.0))
    assert advice.command == "python -m bnfinetune recipe=bn_only train.batch_size=16 'recalibrate.at=[start]'"
    many = recommend(Situation(batch_size=2, ranks=16, training_images=5000))
    assert many.command.startswith("torchrun --nproc_per_node 16 -m bnfinetune recipe=sync_bn")
