"""BN patch files: the running statistics and affine of a network's BN layers alone, a few kilobytes for each domain.

One network that serves several kinds of images differs between them in its BN layers only, when these were re-estimated
(AdaBN, Li et al. 2016) or trained (TENT, Wang et al. 2021; domain-specific BN, Chang et al. 2019). A patch is that
difference as a file, with a hash of all the other weights: statistics belong to the weights that they were computed
with, and on others they are wrong without any error.

The file is in the safetensors format: tensors by clean names, `layer1.0.bn1.running_mean`, and JSON in its metadata.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bnfinetune.bn.layers import Selection, find_bn_layers, select_layers, walk_modules
from bnfinetune.bn.population import AFFINE, STATS, population_of
from bnfinetune.bn.saved_report import SavedReport, plain
from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.bn.tensor_hash import sha256_of
from bnfinetune.errors import CheckpointError, LayerError, StatisticsError

_FORMAT = "bnfinetune.bn_patch"
_VERSION = 1
_COUNTER = STATS[2]
_PACKAGES = ("bnfinetune", "torch", "timm")


@dataclass(frozen=True)
class BNPatch(SavedReport):
    """What a patch file holds and where it comes from; `print` it, or `save` it as JSON.

    Attributes:
        layers: channels of each BN layer in the file, by qualified name.
        affine: whether the file holds weight and bias too.
        complete: whether it holds every BN layer that the network had.
        batches: updates that its running statistics have seen, over the layers at most; None where none counts them.
        values: numbers in the file, counters included.
        weights_sha256: hash of everything in the network's `state_dict` that the file does not hold.
        domain: name of the domain whose statistics these were; None for the layers' own.
        source: how the statistics came about, as far as `save_bn` was told.
        notes: what the user passed.
        saved_at: when, in UTC, ISO 8601.
        versions: of the packages that wrote it.
    """

    layers: dict[str, int]
    affine: bool
    complete: bool
    batches: int | None
    values: int
    weights_sha256: str
    domain: str | None
    source: dict[str, Any]
    notes: dict[str, Any]
    saved_at: str
    versions: dict[str, str]

    def __str__(self) -> str:
        held = "statistics and affine" if self.affine else "statistics"
        whole = "all" if self.complete else "some"
        told = {"domain": self.domain, "source": self.source, "notes": self.notes}
        return "\n".join(
            [
                f"{held} of {len(self.layers)} BN layers ({whole} of the network's), {self.values:,} values",
                f"of weights {self.weights_sha256[:12]}, saved {self.saved_at}, "
                + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
                *(f"{name}: {value}" for name, value in told.items() if value),
            ]
        )


class _Slot(NamedTuple):
    """A tensor of a layer's present population, by its name in the file."""

    key: str
    tensor: Tensor


def save_bn(
    model: nn.Module,
    file: str | Path,
    *,
    layers: Selection = "*",
    exclude: Selection = (),
    affine: bool = True,
    source: PreciseBNReport | Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> BNPatch:
    """Writes the running statistics and affine of BN layers, and nothing else, to a file for `load_bn`.

    Within `domain(model, name)` these are the domain's. The file is whole or absent, whatever happens meanwhile.

    Args:
        model: any module with BN layers, wrapped (DDP, `torch.compile`) or not, under a policy or not, folded or not.
        file: where to; a file that is there is replaced. The name may be any, such as `sketch.safetensors`.
        layers: what to write: globs on qualified layer names, classes or functions of name and layer.
        exclude: the same, of layers to leave out.
        affine: whether weight and bias are written too.
        source: how the statistics came about: what `precise_bn` returned, or a dict of plain values.
        notes: anything else to keep with them, such as the name of the data set; plain values, as JSON can hold them.

    Returns:
        What was written.

    Example:
        >>> report = bnf.precise_bn(model, sketches)
        >>> bnf.save_bn(model, "sketch.safetensors", source=report, notes={"data": "sketches of May"})

    Raises:
        SelectionError: the model has no BN layer, or a selector matches none.
        LayerError: a layer without values (on the meta device), or scripted.
        StatisticsError: the selected layers hold nothing that could be written.
        CheckpointError: the file cannot be written, or `source` or `notes` hold what JSON cannot.
    """
    selected = select_layers(model, layers, exclude)
    tensors = {slot.key: slot.tensor for name, layer in selected.items() for slot in _slots(name, layer, affine)}
    held = {name: layer for name, layer in selected.items() if any(True for _ in _slots(name, layer, affine))}
    if not held:
        raise StatisticsError(f"{file}: none of {len(selected)} BN layers keeps running statistics, and affine=False")
    _require_values(tensors)
    counters = [int(tensor) for key, tensor in tensors.items() if _is_counter(key)]
    patch = BNPatch(
        layers={name: _channels(name, layer, affine) for name, layer in held.items()},
        affine=affine,
        complete=len(held) == len(find_bn_layers(model)),
        batches=max(counters, default=None),
        values=sum(tensor.numel() for tensor in tensors.values()),
        weights_sha256=_hash_of_the_rest(model, held.values(), affine),
        domain=next((name for layer in held.values() if (name := getattr(layer, "_bn_domain", None))), None),
        source=_as_source(source),
        notes=dict(notes or {}),
        saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
    )
    _write(Path(file), tensors, patch)
    return patch


def load_bn(model: nn.Module, file: str | Path, *, layers: Selection = "*", any_weights: bool = False) -> BNPatch:
    """Puts the running statistics and affine of a file that `save_bn` wrote into a model's BN layers, in place.

    All is checked before the first value is written, and if anything fails meanwhile, the model is bit for bit what it
    was. Within `domain(model, name)` the values become the domain's. Policies, modes and `requires_grad` stay. In a
    process group every rank loads for itself.

    Args:
        model: a network with the weights that the file belongs to, wrapped or not, under a policy or not.
        file: what `save_bn` wrote.
        layers: what to load of the model's layers: globs, classes or functions; by default all that the file holds.
        any_weights: load it although the other weights are not those that it belongs to.

    Returns:
        What the file holds and where it comes from.

    Example:
        >>> bnf.load_bn(model, "sketch.safetensors")

    Raises:
        CheckpointError: no such file, no patch, damaged, or of other weights; a layer or tensor that only one of file
            and model has, or of another shape.
        SelectionError: the model has no BN layer, or a selector matches none.
        LayerError: a layer whose weight or bias is computed from others (pruned, parametrised), or without values.
    """
    patch, saved = _read(Path(file))
    present = find_bn_layers(model)
    _require_layers(file, patch, present)
    chosen = {name: present[name] for name in patch.layers}
    if layers != "*":
        chosen = select_layers(model, layers)
        lacking = next((name for name in chosen if name not in patch.layers), None)
        if lacking is not None:
            raise CheckpointError(f"{file} does not hold BN layer {lacking!r}, which layers={layers!r} asks for")
    if not any_weights:
        found = _hash_of_the_rest(model, [present[name] for name in patch.layers], patch.affine)
        _require_same_weights(file, patch, found)
    _copy(_pairs(file, patch, saved, chosen))
    return patch


def _slots(name: str, layer: nn.Module, affine: bool) -> Iterator[_Slot]:
    """The tensors of the population that a layer normalises with now."""
    population = population_of(layer)
    named = list(zip(STATS, population.stats or (), strict=False))
    if affine:
        named += zip(AFFINE, population.affine, strict=True)
    for key, tensor in named:
        if tensor is not None:
            yield _Slot(f"{name}.{key}".lstrip("."), tensor)


def _channels(name: str, layer: nn.Module, affine: bool) -> int:
    return next(len(slot.tensor) for slot in _slots(name, layer, affine) if not _is_counter(slot.key))


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == _COUNTER


def _require_values(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise LayerError(f"{key} is on the meta device and has no values; load the weights first")


def _hash_of_the_rest(model: nn.Module, held: Iterable[nn.Module], affine: bool) -> str:
    """Hash of all that the `state_dict` of the bare model holds beside what a patch of these layers does."""
    layers, left_out = set(held), {*STATS, *(AFFINE if affine else ())}
    rest: dict[str, Tensor] = {}
    for name, module in walk_modules(model):
        own: dict[str, Any] = {}
        module._save_to_state_dict(own, "", keep_vars=True)  # as `state_dict` does, without names of wrappers
        taken = left_out if module in layers else ()
        rest |= {f"{name}.{key}".lstrip("."): value for key, value in own.items() if key not in taken}
    rest = {name: value for name, value in rest.items() if isinstance(value, Tensor)}
    _require_values(rest)
    return sha256_of(rest)


def _as_source(source: PreciseBNReport | Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(source, PreciseBNReport):
        return dict(source or {})
    keys = ("variance", "share", "samples", "batches", "tolerance", "error")
    return {"by": "precise_bn", **plain({key: getattr(source, key) for key in keys})}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        if name in sys.modules:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "not installed"
    return found


def _write(file: Path, tensors: Mapping[str, Tensor], patch: BNPatch) -> None:
    try:
        told = json.dumps(patch.to_dict(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: source and notes must be plain values, as JSON can hold them ({error}); pass strings, numbers, "
            "lists and dicts"
        ) from error
    metadata = {"format": _FORMAT, "version": str(_VERSION), "patch": told}
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save(copies, metadata))
        temporary.replace(file)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        raise CheckpointError(f"{file} could not be written ({reason}); choose another place") from error


def _read(file: Path) -> tuple[BNPatch, dict[str, Tensor]]:
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist or is no file; write it with save_bn")
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged or no safetensors file ({error}); write it anew with save_bn"
        ) from error
    if metadata.get("format") != _FORMAT or metadata.get("version") != str(_VERSION):
        found = f"{metadata.get('format')!r}, version {metadata.get('version')!r}"
        raise CheckpointError(f"{file} is no BN patch of version {_VERSION} (found {found}); write it with save_bn")
    try:
        patch = BNPatch(**json.loads(metadata["patch"]))
        kinds = {"layers": dict, "affine": bool, "complete": bool, "weights_sha256": str}
        wrong = next((key for key, kind in kinds.items() if not isinstance(getattr(patch, key), kind)), None)
        if wrong is not None:
            raise ValueError(f"{wrong}={getattr(patch, wrong)!r}")  # noqa: TRY301
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: its metadata cannot be read ({error}); write it anew") from error
    return patch, tensors


def _require_layers(file: str | Path, patch: BNPatch, present: Mapping[str, nn.Module]) -> None:
    foreign = next((name for name in patch.layers if name not in present), None)
    if foreign is not None:
        raise CheckpointError(
            f"{file} holds BN layer {foreign!r}, which this model has not; build the network that it was saved from"
        )
    lacking = next((name for name in present if name not in patch.layers), None)
    if patch.complete and lacking is not None:
        raise CheckpointError(
            f"{file} holds no BN layer {lacking!r}, which this model has; build the network that it was saved from"
        )


def _require_same_weights(file: str | Path, patch: BNPatch, found: str) -> None:
    if found != patch.weights_sha256:
        raise CheckpointError(
            f"{file} belongs to weights {patch.weights_sha256[:12]}, and these are {found[:12]}: its statistics would "
            "be wrong here; load the weights that it was saved with, or insist by any_weights=True"
        )


def _pairs(
    file: str | Path, patch: BNPatch, saved: Mapping[str, Tensor], chosen: Mapping[str, nn.Module]
) -> list[tuple[Tensor, Tensor]]:
    """The tensors to write, each with its new values, after comparing names and shapes."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, layer in chosen.items():
        slots = {slot.key: slot.tensor for slot in _slots(name, layer, patch.affine)}
        values = {key: tensor for key, tensor in saved.items() if key.rpartition(".")[0] == name}
        _require_values(slots)
        _require_same_tensors(file, slots, values)
        own = [*layer._parameters.values(), *layer._buffers.values()]
        for key in [key for key in slots if key in values]:
            if not any(slots[key] is tensor for tensor in own):
                raise LayerError(
                    f"BN layer {name!r} computes {key.rpartition('.')[2]} from others (pruned or parametrised), so "
                    "that it cannot be written; undo that first (prune.remove, remove_parametrizations)"
                )
            pairs.append((slots[key], values[key]))
    return pairs


def _require_same_tensors(file: str | Path, slots: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    remedy = "build the network that it was saved from"
    for key in (*slots, *values):
        if key in slots and key in values:
            found, shape = tuple(values[key].shape), tuple(slots[key].shape)
            if found != shape:
                raise CheckpointError(f"{file}: {key} has the shape {found}, and the layer's is {shape}; {remedy}")
        elif not _is_counter(key):  # classes without a counter compute the same
            raise CheckpointError(f"{file}: the {'file' if key in slots else 'model'} has not {key}; {remedy}")


@torch.no_grad()
def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Writes all values, or none."""
    before = [target.detach().clone() for target, _ in pairs]
    try:
        for target, value in pairs:
            target.copy_(value)
    except BaseException:
        for (target, _), kept in zip(pairs, before, strict=True):
            target.copy_(kept)
        raise
