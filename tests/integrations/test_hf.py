"""BN in transformers' Trainer: the real Trainer, on timm networks in transformers' wrapper."""

from __future__ import annotations

import logging
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnfinetune as bnf
from bnfinetune.errors import DataError, PolicyError
from tests.bn.models import differing, randomise, tensors_of
from tests.integrations.oracle import worst_error

transformers = pytest.importorskip("transformers")
BNCallback = pytest.importorskip("bnfinetune.integrations.hf").BNCallback

NAMES = ("test_resnet", "test_efficientnet")  # plain BN, and BatchNormAct2d
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 1.5 + 0.3
LABELS = torch.arange(24) % 3
FREEZE = bnf.BNPolicy(train_stats="running", update_stats="none", affine="frozen")
STILL = bnf.BNPolicy(train_stats="running", update_stats="none")


class Items(torch.utils.data.Dataset):
    """Images as the Trainer takes them, with noise from three generators where `noisy`."""

    def __init__(self, noisy: bool = False) -> None:
        self.noisy = noisy

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = IMAGES[index]
        if self.noisy:
            image = image + 0.1 * torch.randn(image.shape) + random.random() + float(np.random.rand())
        return {"pixel_values": image, "labels": int(LABELS[index])}


def wrapped(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=3, num_classes=3)
    return randomise(transformers.TimmWrapperForImageClassification(config))


class Trainer(transformers.Trainer):
    """Notes what every evaluation starts from."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.first = True
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.first:
            assert not model.training
            self.seen = [*getattr(self, "seen", []), tensors_of(self.model)]
            self.first = False
        return super().prediction_step(model, *args, **kwargs)


class EveryStep(transformers.TrainerCallback):
    """Notes the network after every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert all(layer.training for layer in bnf.find_bn_layers(model).values())
        self.states.append(tensors_of(model))


def trainer(folder: Path, model: nn.Module, *callbacks: Any, data: Any = None, optimizers=(None, None), **options: Any):
    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        **options,
    }
    quiet = {"logging_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return Trainer(
        model,
        transformers.TrainingArguments(str(folder), remove_unused_columns=False, **quiet, **arguments),
        train_dataset=Items() if data is None else data,
        eval_dataset=Items(),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def quiet(*args: Any, **options: Any) -> Any:
    return BNCallback(*args, doctor=False, **options)


def trained(*args: Any, resume: Any = None, **options: Any) -> Any:
    running = trainer(*args, **options)
    running.train(resume_from_checkpoint=resume)
    return running


@pytest.mark.parametrize("name", NAMES)
def test_frozen_bn_keeps_its_bytes_through_every_step_although_each_calls_train(name, tmp_path):
    model, steps = wrapped(name), EveryStep()
    before = tensors_of(model)
    trained(tmp_path, model, quiet(FREEZE), steps)
    bn = {f"{layer}." for layer in bnf.find_bn_layers(model)}
    assert len(steps.states) == 6
    for state in steps.states:
        moved = differing(before, state)
        assert any("conv" in key for key in moved)
        assert not [key for key in moved if any(key.startswith(layer) for layer in bn)]


def test_without_the_callback_bn_moves_although_nothing_of_it_trains(tmp_path):
    model = wrapped()
    before = tensors_of(model)
    for layer in bnf.find_bn_layers(model).values():
        layer.requires_grad_(False).eval()
    trained(tmp_path, model, eval_strategy="no")
    assert any("running_mean" in key for key in differing(before, tensors_of(model)))


@pytest.mark.parametrize("name", NAMES)
def test_every_evaluation_sees_population_statistics_and_the_best_is_saved_with_them(name, tmp_path):
    model, callback = wrapped(name), quiet(precise_at="eval", batch_size=len(IMAGES))
    running = trained(
        tmp_path,
        model,
        callback,
        save_strategy="best",
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        eval_on_start=True,
    )
    assert len(running.seen) == 3
    assert len(running.seen) == 3
    assert all(differing(a, b) for a, b in zip(running.seen, running.seen[1:], strict=False))
    assert all(worst_error(wrapped(name), seen, IMAGES) < 1e-4 for seen in running.seen)
    best = transformers.TimmWrapperForImageClassification.from_pretrained(running.state.best_model_checkpoint)
    assert any(not differing(seen, tensors_of(best)) for seen in running.seen)
    assert not differing(tensors_of(model), tensors_of(best))
    assert callback.report.samples == len(IMAGES)


def test_evaluations_within_an_epoch_see_them_too(tmp_path):
    running = trained(tmp_path, wrapped(), quiet(precise_at="eval", batch_size=24), eval_strategy="steps", eval_steps=2)
    assert len(running.seen) == 3
    assert all(worst_error(wrapped(), seen, IMAGES) < 1e-4 for seen in running.seen)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_pass_moves_no_weight_of_the_training(accumulation, tmp_path):
    options = {"data": Items(noisy=True), "eval_strategy": "steps", "eval_steps": 1}
    options["gradient_accumulation_steps"] = accumulation
    with_pass, without = wrapped(), wrapped()
    trained(tmp_path / "a", with_pass, quiet(precise_at="eval", num_samples=9), **options)
    trained(tmp_path / "b", without, **options)
    moved = differing(tensors_of(with_pass), tensors_of(without))
    assert moved
    assert all("running" in key for key in moved)


def test_a_schedule_free_network_gets_the_statistics_of_the_weights_that_are_evaluated(tmp_path):
    pytest.importorskip("schedulefree")
    running = trained(
        tmp_path,
        wrapped(),
        quiet(precise_at="eval", batch_size=24),
        optim="schedule_free_adamw",
        adam_beta1=0.5,
        learning_rate=0.1,
    )
    assert len(running.seen) == 2
    assert all(worst_error(wrapped(), seen, IMAGES) < 1e-4 for seen in running.seen)


def test_at_the_end_it_is_the_best_network_that_gets_them(tmp_path):
    model = wrapped()
    callback = quiet(precise_at="end", batch_size=24)
    running = trained(
        tmp_path,
        model,
        callback,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worse one is kept, to tell it from the last
    )
    best = transformers.TimmWrapperForImageClassification.from_pretrained(running.state.best_model_checkpoint)
    moved = differing(tensors_of(best), tensors_of(model))
    assert moved
    assert all("running" in key for key in moved)
    assert worst_error(wrapped(), tensors_of(model), IMAGES) < 1e-4


POLICIES = [
    bnf.BNPolicy(train_stats="renorm", renorm_warmup=2, renorm_ramp=5, domains="b"),
    bnf.BNPolicy(train_stats="running", update_stats="none", affine="frozen", layers="*layer1*"),
]


@pytest.mark.parametrize("precise_at", [None, "eval"])
def test_a_run_resumed_from_a_checkpoint_is_the_one_without_a_break(precise_at, tmp_path):
    options = {"save_strategy": "epoch", "data": Items(noisy=True)}
    whole, resumed = wrapped(), wrapped()
    trained(tmp_path / "a", whole, quiet(POLICIES, precise_at=precise_at), **options)
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    trained(tmp_path / "b", resumed, quiet(POLICIES, precise_at=precise_at), resume=checkpoint, **options)
    assert not differing(tensors_of(resumed), tensors_of(whole))
    assert bnf.describe_bn(resumed) == bnf.describe_bn(whole)
    states = [bnf.policy_state(model)["layers"] for model in (whole, resumed)]
    for name, entry in states[0].items():
        assert not differing(entry["tensors"], states[1][name]["tensors"])
    ages = {
        int(layer.bn_renorm_age) for layer in bnf.find_bn_layers(resumed).values() if hasattr(layer, "bn_renorm_age")
    }
    assert ages == {6}


def test_a_checkpoint_of_another_policy_wins_and_says_so(tmp_path):
    trained(tmp_path, wrapped(), quiet(STILL), save_strategy="epoch")
    model = wrapped()
    with pytest.warns(UserWarning, match="saved under another BN policy"):
        trained(tmp_path, model, quiet(bnf.BNPolicy(train_stats="renorm")), resume=str(tmp_path / "checkpoint-3"))
    assert bnf.describe_bn(model.eval()) == bnf.describe_bn(bnf.apply_policy(wrapped(), STILL).eval())


def test_a_checkpoint_from_before_the_callback_is_resumed_under_its_policy(tmp_path):
    trained(tmp_path, wrapped(), save_strategy="epoch")
    model = wrapped()
    trained(tmp_path, model, quiet(STILL), resume=str(tmp_path / "checkpoint-3"))
    assert bnf.describe_bn(model.eval()) == bnf.describe_bn(bnf.apply_policy(wrapped(), STILL).eval())


def test_states_of_other_callbacks_may_be_restored_from_the_checkpoint(tmp_path):
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=9)
    options = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trained(tmp_path, wrapped(), quiet(FREEZE), stop, **options)
    model, steps = wrapped(), EveryStep()
    before = tensors_of(model)
    options |= {"restore_callback_states_from_checkpoint": True, "load_best_model_at_end": True}
    trained(
        tmp_path,
        model,
        quiet(FREEZE),
        steps,
        transformers.EarlyStoppingCallback(9),
        resume=str(tmp_path / "checkpoint-3"),
        **options,
    )
    assert len(steps.states) == 3
    assert not [key for key in differing(before, steps.states[-1]) if "running" in key]


def test_the_policy_is_in_force_before_the_optimizer_is_made(tmp_path):
    model = wrapped()
    optimizer = trainer(tmp_path, model, quiet(FREEZE)).create_optimizer()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    affine = {id(p) for layer in bnf.find_bn_layers(model).values() for p in layer.parameters(recurse=False)}
    assert held
    assert affine
    assert not held & affine


def test_added_later_the_policy_is_in_force_when_training_begins(tmp_path):
    model, steps = wrapped(), EveryStep()
    running = trainer(tmp_path, model, steps)
    running.add_callback(quiet(FREEZE))
    before = tensors_of(model)
    running.train()
    assert not [key for key in differing(before, steps.states[-1]) if "bn" in key]


def test_transformers_decays_the_weights_of_bn_and_param_groups_do_not(tmp_path):
    for name in NAMES:
        model = wrapped(name)
        assert "timm_model.bn1.weight" in trainer(tmp_path, model).get_decay_parameter_names(model)
        optimizer = torch.optim.AdamW(bnf.param_groups(model, weight_decay=0.5), lr=0.0)
        running = trainer(tmp_path, model, optimizers=(optimizer, None), learning_rate=0.0)
        running.create_optimizer()
        affine = {id(p) for layer in bnf.find_bn_layers(model).values() for p in layer.parameters(recurse=False)}
        groups = running.optimizer.param_groups
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        assert decayed
        assert not affine & decayed


def test_an_optimizer_of_such_groups_trains(tmp_path):
    model = wrapped()
    optimizer = torch.optim.AdamW(bnf.param_groups(model, weight_decay=0.05), lr=1e-2)
    before = tensors_of(model)
    trained(tmp_path, model, quiet(), optimizers=(optimizer, None))
    assert {"timm_model.conv1.0.weight", "timm_model.bn1.weight"} <= set(differing(before, tensors_of(model)))


def test_the_doctor_warns_of_bn_that_is_frozen_by_requires_grad_alone(tmp_path):
    model = wrapped()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "fc" in name
    callback = BNCallback()
    with pytest.warns(UserWarning, match="BN305"):
        trained(tmp_path, model, callback, num_train_epochs=4)
    assert "BN305" in [found.code for found in callback.findings]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("epochs", [1, 4])  # less than the doctor would look at, and more
def test_the_doctor_warns_of_what_only_steps_can_show(epochs, tmp_path):
    model, callback = wrapped(), BNCallback(FREEZE)
    assert "BN203" not in [found.code for found in bnf.check_bn(bnf.apply_policy(wrapped(), FREEZE))]
    with pytest.warns(UserWarning, match="BN203"):  # statistics that are not of these images
        trained(tmp_path, model, callback, num_train_epochs=epochs, eval_strategy="no")
    assert "BN203" in [found.code for found in callback.findings]


def test_the_doctor_has_nothing_to_warn_of_where_bn_is_frozen(tmp_path):
    model = wrapped()
    bnf.precise_bn(model, [IMAGES])
    optimizer = torch.optim.AdamW(bnf.param_groups(bnf.freeze_bn(model), weight_decay=0.05), lr=1e-3)
    callback = BNCallback(FREEZE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="BN")
        trained(tmp_path, model, callback, optimizers=(optimizer, None), num_train_epochs=4)
    assert not [found for found in callback.findings if found.severity == "error"]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([Items()[index] for index in range(24)])


def test_what_cannot_work_is_said_before_the_first_step(tmp_path):
    steps = EveryStep()
    with pytest.raises(PolicyError, match=r"precise_at='eval' has nothing to do.*include_frozen=True"):
        trained(tmp_path, wrapped(), steps, quiet(FREEZE, precise_at="eval"))
    with pytest.raises(DataError, match=r"come from a .*, which cannot be read twice; give data=LOADER"):
        trained(tmp_path, wrapped(), steps, quiet(precise_at="eval"), data=Stream(), max_steps=2)
    with pytest.raises(PolicyError, match="precise_at='start'; choose 'eval' or 'end', or None"):
        BNCallback(precise_at="start")
    with pytest.raises(PolicyError, match="prior has no meaning without precise_at"):
        BNCallback(prior=16)
    assert not steps.states


def test_a_stream_trains_with_data_of_ones_own(tmp_path):
    data = [{"pixel_values": IMAGES}]
    callback = quiet(precise_at="eval", data=data)
    running = trained(tmp_path, wrapped(), callback, data=Stream(), max_steps=4, eval_strategy="steps", eval_steps=2)
    assert all(worst_error(wrapped(), seen, IMAGES) < 1e-4 for seen in running.seen)


def test_frozen_statistics_are_computed_where_that_is_asked_for(tmp_path):
    callback = quiet(FREEZE, precise_at="eval", include_frozen=True, batch_size=24)
    running = trained(tmp_path, wrapped(), callback)
    assert all(worst_error(wrapped(), seen, IMAGES) < 1e-4 for seen in running.seen)
