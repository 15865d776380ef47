"""Recommendations for planted situations; what they rest on is measured in docs/transfer.md."""

from dataclasses import replace

import pytest
import timm
import torch

from bnfinetune.demo import load_characters
from bnfinetune.diagnose.drift import inspect_bn
from bnfinetune.diagnose.readout import Readout
from bnfinetune.diagnose.recommend import Situation, recommend
from bnfinetune.recipe_files import load_recipe, shipped_recipes

SITUATIONS = {
    "pretrained": (Situation(batch_size=32, training_images=500), "precise_then_freeze"),
    "tiny batch": (Situation(batch_size=2, training_images=500), "precise_then_freeze"),
    "ruined statistics": (
        Situation(batch_size=2, training_images=500, ruined=True),
        "precise_then_freeze",
    ),
    "many images": (Situation(batch_size=32, training_images=50_000), "precise_then_freeze"),
    "untrained, large batch": (Situation(batch_size=32, training_images=5000, untrained=True), "full"),
    "untrained, tiny batch": (Situation(batch_size=2, training_images=5000, untrained=True), "precise_then_freeze"),
    "untrained, on many processes": (
        Situation(batch_size=2, ranks=16, training_images=5000, untrained=True),
        "sync_bn",
    ),
    "untrained, noisy layers": (
        Situation(batch_size=12, training_images=5000, untrained=True, smallest_sound_batch=64),
        "precise_then_freeze",
    ),
    "untrained, quiet layers": (
        Situation(batch_size=12, training_images=5000, untrained=True, smallest_sound_batch=4),
        "full",
    ),
    "tiny set": (Situation(batch_size=16, training_images=50), "lp_ft"),
    "sorted loader": (Situation(batch_size=32, training_images=5000, sorted_batches=True), "bn_only"),
    "no labels": (Situation(batch_size=32, labelled=False), "adabn"),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_fits(name):
    situation, recipe = SITUATIONS[name]
    advice = recommend(situation)
    assert advice.recipe == recipe
    assert recipe in shipped_recipes()
    assert advice.reasons
    assert ("not compared on photographs" in " ".join(advice.reasons)) == (name == "many images")
    load_recipe(advice.recipe, list(advice.overrides))  # every override is a key


@pytest.mark.parametrize("why", [{"training_images": 50}, {"training_images": 5000, "sorted_batches": True}])
def test_where_few_parameters_train_ruined_statistics_are_mended_first(why):
    assert "recalibrate.at=[start]" in recommend(Situation(batch_size=16, ruined=True, **why)).overrides
    assert "recalibrate.at=[start]" not in recommend(Situation(batch_size=16, **why)).overrides


def test_what_was_measured_decides(character_report):
    """Labels of the network's own classes tell, a readout before them."""
    assert not Situation.of(character_report).ruined
    ruined = Readout(256, {0.0: 0.3, 1.0: 0.7}, 1.0, 0.4, 0.03, 9.0)
    assert Situation.of(character_report, readout=ruined).ruined
    foreign = Readout(256, {0.0: 0.7, 0.25: 0.8}, 0.25, 0.1, 0.02, 5.0)
    assert not Situation.of(character_report, readout=foreign).ruined
    chance = Readout(6, {0.0: 0.3, 1.0: 0.6}, 1.0, 0.3, 0.2, 1.5)
    assert not Situation.of(character_report, readout=chance).ruined
    moved = replace(character_report, running=replace(character_report.running, accuracy=0.2))
    assert Situation.of(moved).ruined
    assert recommend(Situation.of(moved)).recipe == "precise_then_freeze"


@pytest.fixture(scope="module")
def character_report():
    split = load_characters(train=512, validation=1)["train"].with_format("torch")
    images = torch.stack([image.float() for image in split["image"]]) / 255 * 2 - 1
    data = list(zip(images.split(64), torch.as_tensor(split["label"][:]).split(64), strict=True))
    return inspect_bn(timm.create_model("bnf_resnet", pretrained=True), data, images=256, causes=0)


def test_the_command_can_be_pasted():
    advice = recommend(Situation(batch_size=16, training_images=50, ruined=True))
    assert advice.command == (
        "python -m bnfinetune recipe=lp_ft train.batch_size=16 'recalibrate.at=[start]' recalibrate.prior=auto"
    )
    assert advice.comparison == (
        "bnfinetune compare 'recipe=[lp_ft, freeze_bn]' train.batch_size=16 'recalibrate.at=[start]' "
        "recalibrate.prior=auto"
    )
    assert advice.comparison in str(advice)
    many = recommend(Situation(batch_size=2, ranks=16, training_images=5000, untrained=True))
    assert many.command.startswith("torchrun --nproc_per_node 16 -m bnfinetune recipe=sync_bn")
