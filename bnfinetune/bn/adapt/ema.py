"""TEMA: statistics of a stream, averaged over its batches, beside the stored ones layer by layer (Su et al. 2024)."""

from __future__ import annotations

import bisect
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfinetune.bn.adapt.copying import bare_copy
from bnfinetune.bn.class_change import input_of_call
from bnfinetune.bn.functional import wide_dtype
from bnfinetune.bn.layers import bn_tail, find_bn_layers
from bnfinetune.bn.population import population_of
from bnfinetune.bn.statistics.moments import mixture
from bnfinetune.bn.statistics.recorder import forwards_replaced
from bnfinetune.errors import PolicyError

_MOMENTA: Final = {1: 0.01, 4: 0.01, 8: 0.1, 64: 0.1, 128: 0.1, 200: 1.0}
"""Weight of a new batch by the least samples that it has: small ones say little, and 200 speak for themselves."""


class StreamEma(nn.Module):
    """A model whose BN layers follow a stream of unlabelled batches, however small they are.

    Each layer keeps an average of the stream's statistics, `m_e <- (1 - h) m_e + h m_B`, likewise the variance, which
    begins at the stored ones; h goes by the size of the batch, from 0.01 for one image to 1 for 200. It normalises by a
    mixture of that average and the stored statistics (see `bnfinetune.bn.statistics.shrinkage`), in which the stored
    ones weigh `(clip(z, -1, 1) + 1) / 4`, from 0 to a half: z is the layer's divergence of both (symmetric
    Kullback-Leibler of Gaussians, the mean over channels), standardised over the layers. Where the stream is farthest
    from what is stored, its statistics are trusted least. Predictions use the average that their own batch has moved,
    and the divergences after the batch before. Source: Su et al., "Unraveling Batch Normalization for Realistic
    Test-Time Adaptation", 2024.

    Args:
        model: a trained model with BN layers; copied, not changed.

    Attributes:
        network: the adapting copy.
        source_weights: of the stored statistics, by layer.
        batches: how many it has followed.

    Raises:
        SelectionError: the model has no BN layer.
        PolicyError: no BN layer has running statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = bare_copy(model)
        layers = find_bn_layers(self.network)
        self._layers = {name: layer for name, layer in layers.items() if population_of(layer).stats is not None}
        if not self._layers:
            raise PolicyError("the stream is weighed against running statistics, and no BN layer has any; use mix")
        self._averages: dict[str, tuple[Tensor, Tensor]] = {}
        self.source_weights = dict.fromkeys(self._layers, 0.25)
        self.batches = 0
        self.eval()

    def train(self, mode: bool = True) -> StreamEma:
        """Stays in evaluation mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Follows a batch and predicts it; takes what the model takes, tensors (N, ...)."""
        leaves = pytree.tree_leaves((args, kwargs))
        samples = next((len(each) for each in leaves if isinstance(each, Tensor) and each.ndim), 0)
        momentum = list(_MOMENTA.values())[max(bisect.bisect_right(list(_MOMENTA), samples) - 1, 0)]
        replaced = {layer: partial(self._normalise, name, layer, momentum) for name, layer in self._layers.items()}
        with forwards_replaced(replaced):
            output = self.network(*args, **kwargs)
        self.batches += 1
        self._weigh()
        return output

    def _normalise(self, name: str, layer: nn.Module, momentum: float, *args: Any, **kwargs: Any) -> Tensor:
        x, population = input_of_call(None, args, kwargs), population_of(layer)
        stats, wide = population.require_stats(), wide_dtype(x.dtype)
        stored = stats.mean.to(wide), stats.var.to(wide)
        if x.numel():
            var, mean = torch.var_mean(x.to(wide), dim=[0, *range(2, x.ndim)], correction=0)
            before = self._averages.get(name, stored)
            self._averages[name] = before[0].lerp(mean, momentum), before[1].lerp(var, momentum)
        average = self._averages.get(name, stored)
        mixed = mixture(*average, *stored, self.source_weights[name])
        weight, bias = (each if each is None else each.to(wide) for each in population.affine)
        y = F.batch_norm(x, *mixed, weight, bias, False, 0.0, population.eps)
        return bn_tail(layer)(y)

    def _weigh(self) -> None:
        if len(self._averages) < 2:
            return
        divergences = torch.stack([self._divergence(name) for name in self._averages])
        z = (divergences - divergences.mean()) / divergences.std(correction=0).clamp(min=1e-12)
        self.source_weights.update(zip(self._averages, ((z.clip(-1, 1) + 1) / 4).tolist(), strict=True))

    def _divergence(self, name: str) -> Tensor:
        """Symmetric Kullback-Leibler divergence of the stored and the averaged Gaussians, the mean over channels."""
        population = population_of(self._layers[name])
        stats, (mean, var) = population.require_stats(), self._averages[name]
        v_s, v_e = stats.var.double().cpu() + population.eps, var.double().cpu() + population.eps
        apart = (stats.mean.double().cpu() - mean.double().cpu()).square()
        return ((v_s + apart) / v_e + (v_e + apart) / v_s).mean() / 2 - 1
