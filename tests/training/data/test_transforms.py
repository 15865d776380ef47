import random
from contextlib import suppress

import numpy as np
import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config

from bnfinetune.errors import RecipeError
from bnfinetune.recipe import Augment, Data
from bnfinetune.training.data import build_transforms
from bnfinetune.training.data.seeding import preserved_draws, seed_draws
from tests.training.data.conftest import DATA_CONFIG, picture


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(30, 21), (9, 40), (16, 16)])
def test_evaluation_equals_timms_pipeline_bit_for_bit(crop_mode, size):
    config = DATA_CONFIG | {"crop_mode": crop_mode}
    image = picture(3, size)
    expected = create_transform(**config)(image)
    assert torch.equal(build_transforms(Data(source="x"), config).eval(image), expected)


@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet", "resnet18", "regnety_002"])
def test_config_of_a_timm_model_is_taken_as_it_is(model):
    config = resolve_data_config({"input_size": (3, 32, 32)}, model=timm.create_model(model, pretrained=False))
    image = picture(4, (50, 40))
    assert torch.equal(build_transforms(Data(source="x"), config).eval(image), create_transform(**config)(image))


def test_augmentation_equals_timms_pipeline_from_the_same_draws():
    augment = Augment(color_jitter=0.3, auto_augment="rand-m9-mstd0.5", scale=(0.2, 0.9), vflip=0.4)
    ours = build_transforms(Data(source="x", augment=augment), DATA_CONFIG).train
    theirs = create_transform(
        **DATA_CONFIG,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        vflip=0.4,
        color_jitter=0.3,
        auto_augment=augment.auto_augment,
    )
    for seed in range(6):
        seed_draws(seed)
        expected = theirs(picture(seed, (20, 30)))
        seed_draws(seed)
        assert torch.equal(ours(picture(seed, (20, 30))), expected)


def test_batch_is_normalised_as_its_images_are():
    transform = build_transforms(Data(source="x"), DATA_CONFIG).eval
    images = [picture(seed) for seed in range(4)]
    batch = transform.finish(torch.from_numpy(np.stack([transform.draw(image) for image in images])))
    assert batch.shape == (4, 3, 16, 16)
    assert batch.is_contiguous()
    assert torch.equal(batch, torch.stack([transform(image) for image in images]))


def test_default_flip_spares_the_demo():
    def flips(data: Data) -> bool:
        return "RandomHorizontalFlip" in repr(build_transforms(data, DATA_CONFIG).train.geometry)

    assert flips(Data(source="x"))
    assert not flips(Data(source="demo"))
    assert not flips(Data(source="demo-characters"))
    assert flips(Data(source="demo", augment=Augment(hflip=0.5)))


def test_image_size_of_the_recipe_has_the_last_word():
    transforms = build_transforms(Data(source="x", image_size=24), DATA_CONFIG)
    assert transforms.eval(picture(1)).shape == transforms.train(picture(1)).shape == (3, 24, 24)


def test_random_erasing_erases_some_images():
    transform = build_transforms(Data(source="x", augment=Augment(random_erasing=0.5)), DATA_CONFIG).train
    plain = build_transforms(Data(source="x"), DATA_CONFIG).train
    changed = 0
    for seed in range(40):
        seed_draws(seed)
        erased = transform(picture(1))
        seed_draws(seed)
        changed += not torch.equal(erased, plain(picture(1)))
    assert 10 <= changed <= 30


def test_grey_model_gets_one_channel():
    transforms = build_transforms(Data(source="x"), DATA_CONFIG | {"input_size": (1, 16, 16)})
    tensor = transforms.eval(picture(1, (16, 16)))
    assert tensor.shape == (1, 16, 16)
    grey = torch.from_numpy(np.array(picture(1, (16, 16)).convert("L"))).double() / 255
    config = DATA_CONFIG | {"crop_pct": 1.0, "input_size": (1, 16, 16)}
    expected = (grey - 0.449) / 0.226  # the averages of the RGB statistics
    assert torch.allclose(build_transforms(Data(source="x"), config).eval(picture(1, (16, 16)))[0].double(), expected)


def test_other_channels_are_refused():
    with pytest.raises(RecipeError, match="takes images of 4 channels"):
        build_transforms(Data(source="x"), DATA_CONFIG | {"input_size": (4, 16, 16)})


@pytest.mark.parametrize("text", ["rnd-m9", "rand-q9", "augmix-z1"])
def test_unknown_policy_is_named_with_examples(text):
    with pytest.raises(RecipeError, match=rf"data.augment.auto_augment: timm cannot read '{text}'"):
        build_transforms(Data(source="x", augment=Augment(auto_augment=text)), DATA_CONFIG)


def test_preserved_draws_give_every_generator_its_state_back():
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.standard_normal()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    np.random.standard_normal()  # leaves a second Gaussian pending
    with preserved_draws():
        expected = draw()
    with suppress(ZeroDivisionError), preserved_draws():
        seed_draws(9)
        draw()
        raise ZeroDivisionError
    assert draw() == expected


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.35, 1.0), (0.08, 1.0)])
def test_no_crop_of_a_smaller_decoded_image_is_smaller_than_the_input(scale):
    transforms = build_transforms(Data(source="x", augment=Augment(scale=scale)), DATA_CONFIG)
    assert transforms.eval.shortest is None
    crop = transforms.train.geometry.transforms[0]
    image = picture(0, (transforms.train.shortest, transforms.train.shortest))
    with preserved_draws():
        sizes = []
        for seed in range(300):
            seed_draws(seed)
            _, _, height, width = crop.get_params(image, crop.scale, crop.ratio)
            sizes.append(min(height, width))
    side = max(DATA_CONFIG["input_size"][1:])
    assert side - 1 <= min(sizes) <= 1.2 * side  # sides are rounded


def test_every_pixel_is_decoded_on_request():
    assert build_transforms(Data(source="x", fast_decode=False), DATA_CONFIG).train.shortest is None
    assert build_transforms(Data(source="x", augment=Augment(scale=(0.0, 1.0))), DATA_CONFIG).train.shortest is None
