"""What computes scores from a batch of prepared images, for each format that a network is written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from bnfinetune.errors import CheckpointError, ExportError

INPUT: Final = "images"
OUTPUT: Final = "logits"
FILES: Final = {"onnx": "model.onnx", "torch_export": "model.pt2", "torchvision": "model.pth"}


class Runner(Protocol):
    """A network as something that computes.

    Attributes:
        device: Where it computes and where it takes images.
    """

    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Scores (B, classes) of prepared images (B, C, height, width)."""
        ...


class TorchRunner:
    """A module of torch, in evaluation mode.

    Args:
        module: From images to scores.
        device: Where it lies.
    """

    def __init__(self, module: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.module, self.device = module, device

    def __call__(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.module(images)


class OnnxRunner:
    """A graph in onnxruntime, on CUDA where that is installed and asked for.

    Args:
        path: The `.onnx` file.
        device: Where to compute.

    Raises:
        ExportError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ExportError(f"{path} needs onnxruntime: pip install 'bnfinetune[export]'") from error
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        offered = set(onnxruntime.get_available_providers())
        providers = [*(name for name in wanted if name in offered), "CPUExecutionProvider"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.device = torch.device("cpu")  # onnxruntime takes and gives arrays of the host

    def __call__(self, images: Tensor) -> Tensor:
        [scores] = self.session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(scores)


def open_runner(folder: Path, stated: Mapping[str, Any], device: torch.device) -> Runner:
    """The network in a folder that `bnfinetune export` wrote.

    Args:
        folder: It.
        stated: What its `preprocessing.json` says.
        device: Where to compute; a graph that cannot go there stays on the CPU.

    Raises:
        CheckpointError: The file is missing or damaged, or of an unknown format.
        ExportError: A package that runs it is not installed.
    """
    if stated.get("format") not in _OPENERS:
        raise CheckpointError(f"checkpoint: {folder} states the format {stated.get('format')!r}; known: {[*_OPENERS]}")
    path = folder / FILES[stated["format"]]
    if not path.is_file():
        raise CheckpointError(f"checkpoint: {folder} has lost its network, {path.name}; write it anew")
    try:
        return _OPENERS[stated["format"]](path, stated, device)
    except ExportError:
        raise
    except Exception as error:  # protobuf, zip, pickle and torch each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint: {path} cannot be loaded ({reason})") from error


def _open_onnx(path: Path, stated: Mapping[str, Any], device: torch.device) -> Runner:
    return OnnxRunner(path, device)


def _open_torch_export(path: Path, stated: Mapping[str, Any], device: torch.device) -> Runner:
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(path)
    return TorchRunner(move_to_device_pass(program, device).module(), device)


def _open_torchvision(path: Path, stated: Mapping[str, Any], device: torch.device) -> Runner:
    model: nn.Module = torchvision.models.get_model(stated["architecture"], num_classes=len(stated["labels"]))
    model.load_state_dict(torch.load(path, "cpu", weights_only=True))
    return TorchRunner(model.to(device).eval(), device)


_OPENERS: Final[Mapping[str, Callable[[Path, Mapping[str, Any], torch.device], Runner]]] = {
    "onnx": _open_onnx,
    "torch_export": _open_torch_export,
    "torchvision": _open_torchvision,
}
