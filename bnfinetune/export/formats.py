"""One writer for each format: from a timm network in evaluation mode to the file that holds it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnfinetune.bn.folding.fuse import fuse_bn
from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.errors import BnFinetuneError, ExportError, SelectionError
from bnfinetune.export.torchvision_twin import torchvision_twin
from bnfinetune.inference.preprocessing import Preprocessing
from bnfinetune.inference.runners import FILES, INPUT, OUTPUT

_LARGE: Final = 2**30  # bytes of weights from which on they lie beside an ONNX graph, which holds 2 GiB at most


class Normalise(nn.Module):
    """`(images - mean) / std`, for images of values from 0 to 1.

    Args:
        mean: Of each channel.
        std: Of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, height, width)."""
        return (images - self.mean) / self.std


def write_network(form: str, model: Any, preprocessing: Preprocessing, folder: Path) -> dict[str, Any]:
    """Write a network into a folder in one of the formats of `FILES`; `model` stays as it is.

    Args:
        form: `onnx`, `torch_export` or `torchvision`.
        model: A timm network on the CPU, in evaluation mode.
        preprocessing: Says the size of its images, and whether it is to normalise them itself.
        folder: Where to write.

    Returns:
        What there is to say of it in `preprocessing.json`.

    Raises:
        ExportError: It cannot be written so.
    """
    try:
        return _WRITERS[form](model, preprocessing, folder / FILES[form])
    except (BnFinetuneError, OSError):
        raise
    except ImportError as error:
        raise ExportError(f"format={form} needs {error.name}: pip install 'bnfinetune[export]'") from error
    except Exception as error:  # tracing meets whatever a network does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"format={form}: torch cannot export {type(model).__name__}: {reason}") from error


def _write_onnx(model: nn.Module, preprocessing: Preprocessing, path: Path) -> dict[str, Any]:
    graph, example, about = _for_deployment(model, preprocessing)
    weights = sum(tensor.nbytes for tensor in graph.state_dict().values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators of which only ONNX has older versions
        torch.onnx.export(
            graph,
            (example,),
            path,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=_dynamic_batch(),
            external_data=weights > _LARGE,
        )
    return about


def _write_torch_export(model: nn.Module, preprocessing: Preprocessing, path: Path) -> dict[str, Any]:
    graph, example, about = _for_deployment(model, preprocessing)
    torch.export.save(torch.export.export(graph, (example,), dynamic_shapes=_dynamic_batch()), path)
    return about


def _write_torchvision(model: Any, preprocessing: Preprocessing, path: Path) -> dict[str, Any]:
    name = torchvision_twin(model)
    torch.save({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return {"architecture": name}


def _for_deployment(model: nn.Module, preprocessing: Preprocessing) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A copy without BN layers, normalising where asked, an example of its input, and what was done."""
    graph = deepcopy(model).requires_grad_(False)
    noise = torch.Generator().manual_seed(0)
    example = torch.rand(2, *preprocessing.input_size, generator=noise)  # two: a batch of one is taken for a constant
    try:
        fused = len(find_bn_layers(graph))
        graph = fuse_bn(graph, example)
    except SelectionError:
        fused = 0
    if preprocessing.in_graph:
        graph = nn.Sequential(Normalise(preprocessing.mean, preprocessing.std), graph)
    return graph.eval(), example, {"fused_bn_layers": fused}


def _dynamic_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


_WRITERS: Final[Mapping[str, Callable[[Any, Preprocessing, Path], dict[str, Any]]]] = {
    "onnx": _write_onnx,
    "torch_export": _write_torch_export,
    "torchvision": _write_torchvision,
}
