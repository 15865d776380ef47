"""Complete training states, from which a run goes on as if it had never stopped."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from bnfinetune.bn.layers import find_bn_layers, is_bn_layer
from bnfinetune.bn.policy.saving import load_policy_state, policy_state
from bnfinetune.errors import CheckpointError
from bnfinetune.training.saving.atomic import complete_folder, in_words, write_folder, write_json, write_text
from bnfinetune.training.saving.timm_folder import RECIPE, save_tensors

CHECKPOINTS = "checkpoints"
_TRAINER, _ABOUT = "trainer.pt", "state.json"


def random_state(device: torch.device) -> dict[str, Any]:
    """Every random state of this process, as primitives and tensors that load without pickled code."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Undo everything drawn since `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def rank_statistics(models: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Copies of the running statistics that this rank's models hold, by model, layer and buffer."""
    return {name: buffer.detach().cpu().clone() for name, buffer in _statistics(models)}


def restore_rank_statistics(models: Mapping[str, nn.Module], saved: Mapping[str, torch.Tensor]) -> None:
    """Write back what `rank_statistics` returned."""
    with torch.no_grad():
        for name, buffer in _statistics(models):
            buffer.copy_(saved[name])


def _statistics(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for model_name, model in models.items():
        for layer_name, layer in find_bn_layers(model).items() if _has_bn(model) else ():
            for key, buffer in layer._buffers.items():
                if buffer is not None:
                    yield f"{model_name}/{layer_name}.{key}", buffer


class StateStore:
    """Complete training states under RUN/checkpoints, the newest `keep` of them.

    A state is a folder `update-00000120`: the weights of the model (and of its average), one file of tensors and
    primitives with the optimizer, the scaler, the progress, the policy's own state, and each rank's random state and
    statistics, and a few words about it (`state.json`).
    """

    def __init__(self, run_folder: Path, keep: int) -> None:
        self.folder = run_folder / CHECKPOINTS
        self.keep = keep

    def save(
        self,
        update: int,
        models: Mapping[str, nn.Module],
        trainer: Mapping[str, Any],
        recipe_text: str,
        about: Mapping[str, Any],
    ) -> None:
        """Write the state after `update` optimizer updates; `models` maps file stems to networks.

        Raises:
            CheckpointError: It cannot be written; the states saved before are as they were.
        """

        def fill(target: Path) -> None:
            for name, model in models.items():
                save_tensors(target / f"{name}.safetensors", model.state_dict())
            policies = {name: policy_state(model) for name, model in models.items() if _has_bn(model)}
            torch.save({**trainer, "policies": policies}, target / _TRAINER)
            write_text(target / RECIPE, recipe_text)
            write_json(target / _ABOUT, about)

        target = self.folder / f"update-{update:08d}"
        with in_words(f"the state {target}"):
            write_folder(target, fill)
        for stale in (*self._folders()[: -self.keep], *self.folder.glob(".update-*.tmp")):
            shutil.rmtree(stale, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("update-*") if p.is_dir() and p.suffix != ".old")

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest undamaged state, if any, and a line for each damaged one that was passed over."""
        passed: list[str] = []
        for folder in reversed(self._folders()):
            try:
                return complete_folder(folder), passed
            except CheckpointError as error:
                passed.append(str(error))
        return None, passed


def _has_bn(model: nn.Module) -> bool:
    return any(is_bn_layer(module) for module in model.modules())


def describe_state(folder: Path) -> dict[str, Any]:
    """What is known of a state without loading it: `update`, `ranks`, `batch_size`, `grad_accum`, `fingerprint`.

    Raises:
        CheckpointError: It cannot be read.
    """
    kinds = {"update": int, "epoch": int, "ranks": int, "batch_size": int, "grad_accum": int, "fingerprint": str}
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        return {key: kind(about[key]) for key, kind in kinds.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be resumed: {_ABOUT} is not what a run writes ({error!r})") from error


def read_state(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """All of a state, on the CPU; under `weights` those of its networks by name.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(folder / _TRAINER, map_location="cpu", weights_only=True)
        state["weights"] = {name: load_file(str(folder / f"{name}.safetensors")) for name in names}
    except Exception as error:  # torch, safetensors and pickle raise each their own
        raise CheckpointError(f"{folder} cannot be resumed: {error}") from error
    return state


def load_networks(folder: Path, state: Mapping[str, Any], models: Mapping[str, nn.Module]) -> None:
    """Bring the weights and policies that `read_state` found in a folder into `models`.

    Raises:
        CheckpointError: They are of other networks.
    """
    try:
        for name, model in models.items():
            model.load_state_dict(state["weights"][name])
            if name in state["policies"]:
                load_policy_state(model, state["policies"][name])
    except Exception as error:  # of torch, and of whatever a foreign state holds
        raise CheckpointError(f"{folder} cannot be resumed: {error}") from error
