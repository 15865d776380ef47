"""BatchNorm within a run: schedules, re-estimated statistics, domains, recomputation."""

import itertools
import json
import os

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

import bnfinetune as bnf
from bnfinetune.errors import DataError, RecipeError
from bnfinetune.training.measuring.measure import load_exported
from tests.training.support import before_ending, bn_keys, broken_off, exported, write_images, write_weights
from tests.training.test_run import last_weights, settings


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def states(folder) -> dict[int, dict[str, torch.Tensor]]:
    """Weights by update."""
    return {
        int(path.name.rpartition("-")[2]): load_file(str(path / "model.safetensors"))
        for path in sorted((folder / "checkpoints").iterdir())
    }


def optimizer_sizes(folder, update) -> list[int]:
    state = torch.load(folder / "checkpoints" / f"update-{update:08d}" / "trainer.pt", weights_only=True)
    return [len(group["params"]) for group in state["optimizer"]["param_groups"]]


EACH = {"checkpoint.every_steps": 1, "checkpoint.keep": 100}
# 18 images in batches of 4 are 5 updates an epoch, 15 in all
FROZEN = {"train_stats": "running", "update_stats": "none", "affine": "frozen"}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_a_frozen_tail_is_re_estimated_then_stands_still(name, images, tmp_path):
    write_weights(tmp_path / "start.safetensors", name)
    options = {"model.name": name, "model.checkpoint": tmp_path / "start.safetensors", "bn.freeze_after": 2, **EACH}
    bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    keys, by_update = bn_keys(name), states(tmp_path / "run")
    for group in ("statistics", "affine"):
        for key in keys[group]:
            assert all(torch.equal(by_update[10][key], by_update[update][key]) for update in range(11, 16)), key
    assert any(not torch.equal(by_update[9][key], by_update[10][key]) for key in keys["statistics"])
    assert any(not torch.equal(by_update[10][key], by_update[15][key]) for key in keys["other"])
    assert sum(optimizer_sizes(tmp_path / "run", 9)) == sum(optimizer_sizes(tmp_path / "run", 10)) + len(keys["affine"])


def test_a_stage_unfreezes_when_it_should_and_alone(images, tmp_path):
    write_weights(tmp_path / "start.safetensors", "resnet18")
    sections = [{**FROZEN}, {"layers": "layer4*", "unfreeze_after": 0.4}]
    options = {"model.name": "resnet18", "model.checkpoint": tmp_path / "start.safetensors", "bn": sections, **EACH}
    bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    by_update, keys = states(tmp_path / "run"), bn_keys("resnet18")
    for key in keys["statistics"] | keys["affine"]:
        late = key.startswith("layer4")
        assert torch.equal(by_update[1][key], by_update[6][key]), key
        assert torch.equal(by_update[6][key], by_update[15][key]) != late, key


@pytest.mark.parametrize("stop_at", [7, 12])
def test_going_on_across_a_freeze_is_bit_for_bit(stop_at, images, tmp_path, monkeypatch):
    options = {"bn.freeze_after": 0.6, "checkpoint.every_steps": 1, "train.ema": 0.8}
    bnf.finetune("full", **settings(images, tmp_path / "whole", **options))
    with broken_off(monkeypatch, stop_at):
        bnf.finetune("full", **settings(images, tmp_path / "broken", **options))
    bnf.finetune("full", **settings(images, tmp_path / "broken", **options), **{"train.resume": "auto"})
    one, other = last_weights(tmp_path / "whole"), last_weights(tmp_path / "broken")
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_moments_of_change_are_checked(images, tmp_path):
    with pytest.raises(RecipeError, match="not before the end of the last epoch"):
        bnf.finetune("full", **settings(images, tmp_path / "run", **{"bn.freeze_after": 3}))


def test_statistics_at_the_end_are_those_of_the_training_images(images, tmp_path):
    options = {"model.name": "resnet18", "model.pretrained": False, "recalibrate.at": ["end"]}
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **options))
    weights = exported(tmp_path / "run" / "best")
    model = timm.create_model("resnet18", num_classes=3)
    model.load_state_dict(weights)
    seen = []
    model.conv1.register_forward_hook(lambda module, args, out: seen.append(out.double()))
    data = torch.stack([image for _, image in sorted(training_images(images, model))])
    model(data)
    values = torch.cat(seen).transpose(0, 1).flatten(1)
    torch.testing.assert_close(weights["bn1.running_mean"].double(), values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights["bn1.running_var"].double(), values.var(1, unbiased=False), rtol=1e-5, atol=1e-6)
    stated = json.loads((tmp_path / "run/best/statistics.json").read_text())
    assert (stated["computed"], stated["images"], stated["data"]) == ("precise-BN", 18, "train")
    assert result.after["validation"].images == 9


def training_images(images, model, size=32):
    """The oracle's own preprocessing: timm's, file by file."""
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, model=model) | {"input_size": (3, size, size)}
    transform = create_transform(**config, is_training=False)
    return [(str(path), transform(Image.open(path))) for path in (images / "train").rglob("*.png")]


def test_statistics_of_other_weights_warn(images, tmp_path):
    bnf.finetune("full", **settings(images, tmp_path / "run", **{"train.epochs": 1}))
    best = tmp_path / "run" / "best"
    load_exported(best)
    weights = exported(best)
    weights["fc.weight"] += 1
    save_file(weights, str(best / "model.safetensors"))
    with pytest.warns(UserWarning, match="computed for other weights"):
        load_exported(best)


@pytest.mark.parametrize("recipe", ["adabn", "precise_then_freeze", "precise_bn"])
def test_recalibrating_recipes_change_statistics_as_they_say(recipe, images, tmp_path):
    start = write_weights(tmp_path / "start.safetensors", "efficientnet_b0")
    options = {"model.name": "efficientnet_b0", "model.checkpoint": tmp_path / "start.safetensors"}
    options |= {"recalibrate.prior": 18}
    bnf.finetune(recipe, **settings(images, tmp_path / "run", **options))
    end, keys = exported(tmp_path / "run" / "best"), bn_keys("efficientnet_b0")
    assert any(not torch.equal(start[key], end[key]) for key in keys["statistics"])
    if recipe == "adabn":
        assert all(torch.equal(start[key], end[key]) for key in keys["other"] | keys["affine"] | keys["head"])
    if recipe == "precise_then_freeze":
        one, last = states(tmp_path / "run").values()
        assert all(torch.equal(one[key], last[key]) for key in keys["statistics"])


@pytest.mark.parametrize("damaged", [True, False])
def test_a_chosen_prior_leaves_statistics_alone_unless_the_images_know_better(damaged, images, tmp_path):
    write_weights(tmp_path / "start.safetensors", "bnf_resnet")
    if damaged:  # every image ends in the same activations
        weights = load_file(str(tmp_path / "start.safetensors"))
        for key in weights:
            if key.endswith("running_mean"):
                weights[key] += 30 * weights[key.replace("mean", "var")].sqrt()
        save_file(weights, str(tmp_path / "start.safetensors"))
    options = {"model.name": "bnf_resnet", "model.checkpoint": tmp_path / "start.safetensors"}
    bnf.finetune("precise_then_freeze", **settings(images, tmp_path / "run", **options))
    stated = json.loads((tmp_path / "run/best/statistics.json").read_text())
    assert (stated["share"] > 0) == damaged, stated


def test_statistics_come_from_the_images_and_preprocessing_asked_for(images, tmp_path):
    start = write_weights(tmp_path / "start.safetensors", "test_resnet")
    ends = {}
    for case in ("train eval", "train train", "target eval"):
        data, preprocessing = case.split()
        asked = {"at": ["end"], "data": data, "preprocessing": preprocessing}
        options = {"model.checkpoint": tmp_path / "start.safetensors", "train.steps": 0, "recalibrate": asked}
        bnf.finetune("full", **settings(images, tmp_path / case, **options))
        ends[case] = exported(tmp_path / case / "best")
        assert json.loads((tmp_path / case / "best/statistics.json").read_text())["images"] == {"train": 18}.get(
            data, 9
        )
    keys = bn_keys("test_resnet")
    for one, other in itertools.combinations([start, *ends.values()], 2):
        assert any(not torch.equal(one[key], other[key]) for key in keys["statistics"])
        assert all(torch.equal(one[key], other[key]) for key in keys["other"] | keys["affine"])


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_tent_measures_an_adapting_copy_and_saves_the_source(name, images, tmp_path):
    start = write_weights(tmp_path / "start.safetensors", name)
    options = {"model.name": name, "model.checkpoint": tmp_path / "start.safetensors"}
    options |= {"evaluate.batch_size": 16, "data.train_split": "val", "data.val_split": "train"}
    result = bnf.finetune("tent", **settings(images, tmp_path / "run", **options))
    end, head = exported(tmp_path / "run" / "best"), bn_keys(name)["head"]
    assert all(torch.equal(start[key], end[key]) for key in start.keys() - head)
    assert result.after["validation"].loss != result.before["validation"].loss
    assert result.history[-1]["loss"] == pytest.approx(result.before["validation"].loss)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_gradient_checkpointing_updates_statistics_once(name, images, tmp_path):
    write_weights(tmp_path / "start.safetensors", name)
    ends = {}
    for checkpointing in (False, True):
        options = {"model.name": name, "model.checkpoint": tmp_path / "start.safetensors",
                   "model.grad_checkpointing": checkpointing, "train.epochs": 1}  # fmt: skip
        bnf.finetune("full", **settings(images, tmp_path / str(checkpointing), **options))
        ends[checkpointing] = last_weights(tmp_path / str(checkpointing))
    for key, value in ends[False].items():
        torch.testing.assert_close(ends[True][key], value, rtol=1e-4, atol=1e-6, msg=key)


OPTIONS = {
    "bf16": {"train.mixed_precision": "bf16"},
    "channels_last": {"model.channels_last": True, "model.name": "resnet18", "model.pretrained": False},
    "deterministic": {"run.deterministic": True},
    "tracked": {"run.tracking": "tensorboard"},
    "workers": {"data.workers": 2},
    "compiled": {"model.compile": True},
}


@pytest.mark.parametrize("option", [*list(OPTIONS)[:-1], pytest.param("compiled", marks=pytest.mark.slow)])
def test_options_of_the_loop_run_and_keep_the_freeze(option, images, tmp_path):
    if option == "tracked":
        pytest.importorskip("tensorboard", reason="the tracker itself is optional")
    name = "resnet18" if option == "channels_last" else "test_resnet"
    options = settings(images, tmp_path / "run", **{"train.epochs": 2}, **OPTIONS[option])
    bnf.finetune("freeze_bn", **options)
    torch.use_deterministic_algorithms(False)
    first, last = states(tmp_path / "run").values()
    keys = bn_keys(name)
    assert all(torch.equal(first[key], last[key]) for key in keys["statistics"] | keys["affine"])
    assert any(not torch.equal(first[key], last[key]) for key in keys["other"])
    if option == "tracked":
        assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def write_domains(path):
    """Two domains of the same classes whose brightness differs, as parquet."""
    import datasets
    from PIL import Image

    rng = np.random.default_rng(0)
    rows = {"image": [], "label": [], "domain": []}
    for number in range(48):
        bright, label = number % 2, number // 2 % 3
        pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8) + np.uint8(120 * bright)
        pixels[..., label] += 60
        rows["image"].append(Image.fromarray(pixels))
        rows["label"].append("rgb"[label])
        rows["domain"].append("bright" if bright else "dark")
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(path))
    return path


def test_domains_keep_statistics_apart_and_one_is_exported_plain(tmp_path):
    path = write_domains(tmp_path / "train.parquet")
    weights = {}
    for name in ("dark", "bright"):
        options = {"data.domain_column": "domain", "bn.domains": ["dark", "bright"], "evaluate.domain": name,
                   "bn.train_stats": "batch", "train.batch_size": 8, "optim.lr": 1e-9}  # fmt: skip
        bnf.finetune("full", **settings(path, tmp_path / name, **options))
        weights[name] = exported(tmp_path / name / "best")
    assert weights["dark"].keys() == timm.create_model("test_resnet", num_classes=3).state_dict().keys()
    dark, bright = (weights[name]["bn1.running_mean"] for name in ("dark", "bright"))
    assert (dark - bright).abs().max() > 0.03
    options = {"data.domain_column": "domain", "bn.domains": ["dark"], "bn.train_stats": "batch"}
    with pytest.raises(DataError, match="holds the domain 'bright', which is not among"):
        bnf.finetune("full", **settings(path, tmp_path / "x", **options))


def run_rank(rank, world, port, images, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")  # fmt: skip
    torch.set_num_threads(1)
    # what training ended with on this rank
    before_ending(lambda trainer: torch.save(trainer.model.state_dict(), folder / f"{trainer.recipe.name}-{rank}.pt"))
    runs = {"freeze_tail": {"bn.freeze_after": 0.5}, "precise_bn": {}, "sync_bn": {}}
    for recipe, options in runs.items():
        options |= {"model.name": "resnet18", "model.checkpoint": folder / "start.safetensors", "train.epochs": 2}
        bnf.finetune(recipe, **settings(images, folder / recipe, **options))
    torch.distributed.destroy_process_group()


def test_ranks_agree_through_freezes_and_re_estimation(images, tmp_path, free_port):
    write_weights(tmp_path / "start.safetensors", "resnet18")
    mp.spawn(run_rank, args=(2, free_port, images, tmp_path), nprocs=2)
    for recipe in ("freeze_tail", "precise_bn", "sync_bn"):
        first, second = (torch.load(tmp_path / f"{recipe}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("standardised", [False, True])
def test_group_norm_networks_train_and_load_again(standardised, images, tmp_path):
    write_weights(tmp_path / "start.safetensors", "resnet18")
    options = {"model.name": "resnet18", "model.checkpoint": tmp_path / "start.safetensors",
               "model.weight_standardisation": standardised, "train.epochs": 1}  # fmt: skip
    result = bnf.finetune("group_norm", **settings(images, tmp_path / "run", **options))
    loaded = load_exported(tmp_path / "run" / "best")
    assert any(isinstance(module, torch.nn.GroupNorm) for module in loaded.modules())
    batch = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(batch), result.model.eval()(batch))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_the_last_layer_and_the_head_are_tuned_at_another_size(name, images, tmp_path):
    write_weights(tmp_path / "start.safetensors", name)
    start = {"model.name": name, "model.checkpoint": tmp_path / "start.safetensors"}
    bnf.finetune("freeze_bn", **settings(images, tmp_path / "run", **start, **{"train.epochs": 1}))
    first = exported(tmp_path / "run" / "best")
    stage = {"model.name": f"local-dir:{tmp_path / 'run' / 'best'}", "data.image_size": 48, "train.epochs": 1}
    result = bnf.finetune("fix_size", **settings(images, tmp_path / "stage", **stage, **EACH))
    keys, last = bn_keys(name), list(bnf.find_bn_layers(result.model))[-1]
    state = states(tmp_path / "stage")[5]
    moved = {key for key, value in state.items() if not torch.equal(value, first[key])}
    assert moved == {f"{last}.{key}" for key in ("weight", "bias", "running_mean", "running_var")} | keys["head"]
    oracle = load_exported(tmp_path / "run" / "best")
    inputs = []
    oracle.get_submodule(last).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        oracle(torch.stack([image for _, image in training_images(images, oracle, 48)]))
    x = inputs[0].double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(state[f"{last}.running_mean"].double(), x.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[f"{last}.running_var"].double(), x.var(1, correction=0), rtol=1e-4, atol=1e-5)
