"""How the BN statistics of a network fare over a run, followed on one fixed sample of training images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bnfinetune.bn.layers import find_bn_layers, is_bn_layer
from bnfinetune.diagnose.drift import inspect_bn, layer_drifts
from bnfinetune.diagnose.drift_report import DriftReport
from bnfinetune.diagnose.layer_drift import Stored, moved, stored_of
from bnfinetune.training.data.loaders import Loaders
from bnfinetune.training.data.reading import Failure

LEAST, MOST = 16, 64
"""Images that the whole measurement at the end takes; drift is freed of the noise of so few."""

_SHARE = 32  # images that are trained on for each that is measured, so that a short run does not wait for its report


class DriftMeter:
    """Measures BN statistics at each evaluation; a network without any gives no measurement.

    The sample is prepared as for evaluation and the same each time, whatever the ranks and workers, and so is what is
    measured in a run that goes on where it stopped.

    Attributes:
        start: what `read` gives of the network as the run starts.

    Args:
        network: the network as the run starts, before any statistic of it is computed anew.
        loaders: whose training images are sampled.
        accelerator: for device, precision and rank; only rank 0 measures.
        domain: number of the domain whose images are measured; None where there are no domains.
        trained: images that the run will train on, of all epochs; fewer are measured of a short run.
    """

    def __init__(
        self, network: nn.Module, loaders: Loaders, accelerator: Accelerator, domain: int | None, trained: int
    ) -> None:
        self._accelerator = accelerator
        self._start: Mapping[str, Stored] = {}
        self._images = torch.empty(0)
        if accelerator.is_main_process and any(is_bn_layer(module) for module in network.modules()):
            self._start = stored_of(find_bn_layers(network))
            self._images = _sample(loaders, domain, min(max(trained // _SHARE, LEAST), MOST))
        self.start = self.read(network)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to measure here: no running statistics, or another rank's task."""
        return not self._start or len(self._images) < 2

    def read(self, network: nn.Module) -> dict[str, float]:
        """Drift and movement of the worst layer, in standard deviations, by the first 16 images of the sample.

        Returns:
            `bn_drift`: distance of the stored statistics from those of the sample, see `LayerReport.drift`;
            `bn_moved`: distance of the stored statistics from those at the start. What is not finite is left out.
        """
        if self.idle:
            return {}
        with self._accelerator.autocast():
            drifts = layer_drifts(network, self._images[:LEAST])
        layers = find_bn_layers(network)
        values = {
            "bn_drift": max((drift.drift for drift in drifts.values()), default=math.nan),
            "bn_moved": max((moved(layers[name], before) for name, before in self._start.items()), default=math.nan),
        }
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def report(self, network: nn.Module, batch_size: int) -> DriftReport | None:
        """The whole measurement of a network, trained with such batches; None where there is nothing to measure."""
        if self.idle:
            return None
        batches = self._images.split(batch_size)
        with self._accelerator.autocast():
            return inspect_bn(network, [batch for batch in batches if len(batch) > 1] or batches, causes=0)


def _sample(loaders: Loaders, domain: int | None, images: int) -> Tensor:
    """Some training images as evaluation sees them, read in this process so that no worker need start."""
    loader: Any = loaders.stats
    picks, domains = next(iter(loader.batch_sampler)), loader.dataset.domains
    if domain is not None and domains is not None:
        picks = [pick for pick in picks if domains[pick.number] == domain]
    batch = loader.dataset.__getitems__(picks[:images])
    if isinstance(batch, Failure):  # what needs these images will say so, on all ranks alike
        return torch.empty(0)
    found: Tensor = loader.finish(batch.images)
    return found
