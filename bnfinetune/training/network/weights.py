"""Weights from a file that somebody else's training wrote: found under whatever it wrapped them in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv, get_model_input_config
from torch import Tensor, nn

from bnfinetune.errors import CheckpointError
from bnfinetune.notes import note
from bnfinetune.training.network.head import head_parameters

_DEPTH: Final = 3  # of mappings in mappings that are looked through
# of several networks in a file, the one to be used: an average before what it is of
_PREFERRED: Final = ("ema", "teacher", "encoder_q", "online")

Weights = dict[str, Tensor]


def load_weights_file(model: nn.Module, path: Path) -> None:
    """Load a weights file into `model`; a head of another size stays new, anything else missing is an error.

    The weights may lie in mappings (`state_dict`, `model_state_dict`, `teacher`, ...) under a common prefix (`module.`,
    `model.`, `backbone.`, `module.encoder_q.`, ...): those are taken that fit most of the network's own names. What
    lies beside them is counted in a note. A first convolution of three channels is fitted to the network's channels.

    Raises:
        CheckpointError: It cannot be read, or does not fit.
    """
    if path.is_dir():
        file = next(
            (path / name for name in ("model.safetensors", "best/model.safetensors") if (path / name).is_file()), None
        )
        remedy = f"; name {file}" if file is not None else ""
        raise CheckpointError(f"model.checkpoint: no file {path}, it is a folder{remedy}")
    if not path.is_file():
        raise CheckpointError(f"model.checkpoint: no file {path}")
    try:
        content: Any = load_file(str(path)) if _is_safetensors(path) else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip each raise their own; all mean an unusable file
        raise CheckpointError(
            f"model.checkpoint: {path} is neither safetensors nor a tensors-only pickle ({_reason(error, path)})"
        ) from error
    own = model.state_dict()
    weights, beside = _best_fit(content, own)
    if beside:
        note(f"model.checkpoint: {path}: {len(beside)} tensors of no layer here are passed over, such as {beside[0]}")
    head = head_parameters(model)
    head_layers = {_layer(name) for name, parameter in model.named_parameters() if id(parameter) in head}
    head_names = {name for name in own if _layer(name) in head_layers}  # with statistics, as LeViT's classifier has
    _fit_input(model, weights, own)
    resized = {_layer(name) for name in head_names & weights.keys() if weights[name].shape != own[name].shape}
    for name in [name for name in head_names & weights.keys() if _layer(name) in resized]:
        del weights[name]
    _check(weights, own, head_names, path)
    model.load_state_dict(weights, strict=False)


def _check(weights: Weights, own: Mapping[str, Tensor], head_names: set[str], path: Path) -> None:
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # old files lack them: they stay zero
    missing = own.keys() - weights.keys() - head_names - counters
    wrong = [name for name, value in weights.items() if name in own and value.shape != own[name].shape]
    unknown = sorted(weights.keys() - own.keys())
    for problem, names in (("lacks", sorted(missing)), ("has another shape of", wrong), ("has unknown", unknown)):
        if names:
            shapes = f" ({list(weights[names[0]].shape)}, not {list(own[names[0]].shape)})" if names is wrong else ""
            raise CheckpointError(
                f"model.checkpoint: {path} {problem} {names[0]}{shapes} ({len(names)} such): is model.name right?"
            )


def _best_fit(content: Any, own: Mapping[str, Tensor]) -> tuple[Weights, list[str]]:
    """The tensors that fit most of the network's names, by these names, and the names of what lies beside them."""
    best: tuple[tuple[int, int], Weights, list[str]] = ((-1, 0), {}, [])
    for place, tensors in _mappings(content, ""):
        prefixes = _prefixes(tensors, own) or Counter({"": 0})
        for prefix, fitting in prefixes.items():
            score = (fitting, _preference(f"{place}{prefix}"))
            if score > best[0]:
                inside = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
                beside = [name for name in tensors if not name.startswith(prefix)]
                best = (score, inside, beside)
    (fitting, _), weights, beside = best
    strange = [name for name in weights if name not in own]
    if fitting >= len(own) / 2 and beside:  # a part of a larger network: what else it has inside is not ours
        return {name: value for name, value in weights.items() if name in own}, beside + strange
    return weights, beside


def _mappings(content: Any, place: str) -> Iterator[tuple[str, Weights]]:
    """Every mapping of names to tensors in a file, with the keys that lead to it."""
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            yield place, tensors
        if place.count("/") < _DEPTH:
            for name, inner in content.items():
                yield from _mappings(inner, f"{place}{name}/")


def _prefixes(tensors: Weights, own: Mapping[str, Tensor]) -> Counter[str]:
    """How many of the network's names stand behind each prefix."""
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                counts[".".join(parts[:start]) + "." * bool(start)] += 1
    return counts


def _preference(place: str) -> int:
    """The higher, the likelier are these the weights to be used, of several that fit as well."""
    return max((len(_PREFERRED) - rank for rank, word in enumerate(_PREFERRED) if word in place), default=0)


def _fit_input(model: Any, weights: Weights, own: Mapping[str, Tensor]) -> None:
    """Fit the first convolutions to the network's channels, as timm does with its own weights."""
    found = get_model_input_config(model)
    first = found["first_conv"] or ()
    for name in (f"{layer}.weight" for layer in ((first,) if isinstance(first, str) else first)):
        if name in weights and name in own and weights[name].shape[1:2] != own[name].shape[1:2]:
            try:
                weights[name] = adapt_input_conv(found["input_size"][0], weights[name])
            except (NotImplementedError, AssertionError):
                continue  # the shapes say it


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _is_safetensors(path: Path) -> bool:
    """Whether a file is one by its name, or begins as one does: with the length of its header and a JSON mapping."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _reason(error: Exception, path: Path) -> str:
    """Why a file cannot be read, where its reader does not say it so that one can go on from there."""
    with path.open("rb") as file:
        if file.read(20) == b"version https://git-":
            return "it is the pointer of a Git LFS file: fetch the file by git lfs pull"
    if "Unsupported global" in str(error):
        return "it holds other objects of Python too, which would run code: save its state_dict() alone"
    return _line(error)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__
