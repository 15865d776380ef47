"""TENT: entropy minimisation at test time (Wang et al. 2021), with guards against its known ways to fail."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnfinetune.bn.adapt.certainty import certainty, logits_in
from bnfinetune.bn.adapt.copying import bare_copy, switch_where
from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.policy.apply import apply_policy
from bnfinetune.bn.policy.spec import BNPolicy
from bnfinetune.bn.population import population_of
from bnfinetune.bn.statistics.batches import device_of, images_tensor, to_device
from bnfinetune.errors import PolicyError

MIN_BATCH = 16
"""Below this, statistics of single batches do more harm than good (Schneider et al. 2020, figure 3)."""

_MEMORY = 0.9


class Tent(nn.Module):
    """Entropy minimisation at test time, with guards against its known ways to fail.

    Called on a batch, it predicts with the batch's own statistics, then takes one Adam step on the mean entropy of
    these predictions, `L = mean_i(-sum_c p_ic log p_ic)`, in the weights and biases of the BN layers alone; the
    predictions are those from before the step (Wang et al. 2021). Of dense predictions (N, classes, H, W), every pixel
    is one. The model may give them by themselves, first in a tuple, or in a dict or output object under `logits` or
    `out`. The guards:

    - a batch below `min_batch` is predicted by prior mixing, without a step;
    - collapse: the model has become surer while the number of classes that it predicts, `exp(H(mean_i p_i))` in an
      average over batches, has fallen below `collapse` of its largest value. Then weights and biases go back to the
      source's, the batch is predicted anew, and adaptation starts afresh; after `max_resets` times it ends;
    - an entropy that is not finite counts as collapse;
    - after `max_steps` steps it goes on without any.

    Ranks adapt each on its own.

    Args:
        model: a trained classifier or segmenter with BN layers; copied, not changed.
        lr: Adam's learning rate.
        min_batch: the smallest batch to adapt to.
        mix_prior: N of prior mixing for smaller batches.
        collapse: the share of the largest number of predicted classes that counts as collapse.
        max_resets: how often to start afresh before giving up.
        max_steps: at most so many steps; None for no bound.

    Attributes:
        network: the adapting copy.
        steps: steps taken so far.
        resets: how often it has gone back to the source.
        small_batches: how many batches were too small to adapt to.

    Raises:
        SelectionError: the model has no BN layer.
        PolicyError: no BN layer has a weight or bias, or a value is out of bounds.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        min_batch: int = MIN_BATCH,
        mix_prior: float = 16.0,
        collapse: float = 0.5,
        max_resets: int = 3,
        max_steps: int | None = None,
    ) -> None:
        super().__init__()
        if not lr > 0 or min_batch < 2 or not 0 < collapse < 1:
            raise PolicyError(
                f"tent with lr={lr}, min_batch={min_batch}, collapse={collapse}: use lr above 0, min_batch of at "
                "least 2, and collapse between 0 and 1"
            )
        self.network = bare_copy(model)
        self.min_batch, self.mix_prior, self.collapse = min_batch, mix_prior, collapse
        self.max_resets, self.max_steps = max_resets, max_steps
        self.steps = self.resets = self.small_batches = 0
        self._affine = _train_affine_only(self.network)
        self._source = [parameter.detach().clone() for parameter in self._affine]
        self._optimizer = torch.optim.Adam(self._affine, lr=lr)
        self._fresh_optimizer = copy.deepcopy(self._optimizer.state_dict())
        self._average = _Average()
        self.eval()

    def train(self, mode: bool = True) -> Tent:
        """Stays in evaluation mode, whatever is asked for: it adapts there, and training would move the statistics."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts a batch, then adapts to it; takes what the model takes, tensors (N, ...).

        Returns:
            What the model gives, without gradient.

        Raises:
            PolicyError: that holds no logits (N, classes) or (N, classes, H, W).
        """
        inputs = (args, kwargs)
        samples = next((len(each) for each in pytree.tree_leaves(inputs) if isinstance(each, Tensor) and each.ndim), 0)
        if samples < self.min_batch:
            self.small_batches += 1
            return self._predict_mixed(inputs)
        # Evaluation loops run in inference mode, whose tensors cannot take part in a backward pass.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = pytree.tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, inputs)
            output = self._predict(inputs)
            if not self.exhausted:
                output = self._adapt_to(inputs, output, samples)
        return pytree.tree_map_only(Tensor, Tensor.detach, output)

    def _predict(self, inputs: tuple[Any, Any]) -> Any:
        args, kwargs = inputs
        return self.network(*args, **kwargs)

    @property
    def exhausted(self) -> bool:
        """Whether it has stopped to adapt, after `max_steps` steps or more than `max_resets` resets."""
        return self.resets > self.max_resets or (self.max_steps is not None and self.steps >= self.max_steps)

    def adapt(self, data: Iterable[Any], passes: int) -> None:
        """Adapts on all but the last of some passes over unlabelled data, and lets the last be one of predictions.

        Args:
            data: batches in any form that `precise_bn` takes, the same that will be predicted.
            passes: how often each batch may be adapted to, predictions included.

        Raises:
            PolicyError: `passes` is below 1.
        """
        if passes < 1:
            raise PolicyError(f"tent with passes={passes}; it adapts while it predicts, so give at least 1")
        device = device_of(self.network)
        batches = len(cast(Sized, data)) if hasattr(data, "__len__") else None
        for _ in range(passes - 1):
            batches = 0
            for batch in data:
                self(to_device(images_tensor(batch, "tent"), device))
                batches += 1
        if batches is not None:
            self.max_steps = self.steps + batches

    def _adapt_to(self, inputs: tuple[Any, Any], output: Any, samples: int) -> Any:
        """Takes one step, or goes back to the source and predicts anew."""
        entropies, mean_prediction = certainty(logits_in(output, samples, "TENT", "adabn or mix"))
        entropy = entropies.mean()
        if not entropy.isfinite() or self._average.has_collapsed(entropy.item(), mean_prediction, self.collapse):
            self._back_to_source()
            return self._predict(inputs)
        self._optimizer.zero_grad()
        entropy.backward()
        with torch.device("cpu"):  # Adam counts its steps on the default device, which may be any
            self._optimizer.step()
        self.steps += 1
        return output

    @torch.no_grad()
    def _back_to_source(self) -> None:
        for parameter, source in zip(self._affine, self._source, strict=True):
            parameter.copy_(source)
        self._optimizer.load_state_dict(copy.deepcopy(self._fresh_optimizer))
        self._average = _Average()
        self.resets += 1

    @torch.no_grad()
    def _predict_mixed(self, inputs: tuple[Any, Any]) -> Any:
        apply_policy(self.network, BNPolicy(eval_stats="mix", mix_prior=self.mix_prior))
        try:
            return self._predict(inputs)
        finally:
            apply_policy(self.network, BNPolicy(eval_stats="batch"))


class _Average:
    """Running averages of a model's certainty and of the classes that it predicts."""

    def __init__(self) -> None:
        self._prediction: Tensor | None = None
        self._entropy = self._first_entropy = math.inf
        self._most_classes = 0.0

    def has_collapsed(self, entropy: float, prediction: Tensor, share: float) -> bool:
        """Takes the next batch's mean entropy and mean prediction (classes,); says whether the model has collapsed."""
        if self._prediction is None:
            self._prediction, self._entropy, self._first_entropy = prediction, entropy, entropy
        self._prediction = torch.lerp(self._prediction, prediction, 1 - _MEMORY)
        self._entropy += (1 - _MEMORY) * (entropy - self._entropy)
        classes = math.exp(torch.special.entr(self._prediction).sum().item())
        self._most_classes = max(self._most_classes, classes)
        return classes < share * self._most_classes and self._entropy < self._first_entropy


def _train_affine_only(net: nn.Module) -> list[nn.Parameter]:
    """Puts a model's BN layers under TENT's policy; gives the parameters that alone are trained."""
    apply_policy(net, BNPolicy(eval_stats="batch"))
    switch_where(net, lambda layer: any(tensor is not None for tensor in population_of(layer).affine), affine="trained")
    net.requires_grad_(False)
    named = [layer._parameters.get(key) for layer in find_bn_layers(net).values() for key in ("weight", "bias")]
    affine = [parameter for parameter in named if parameter is not None]
    for parameter in affine:
        parameter.requires_grad_()
    if any(parameter.device.type == "meta" for parameter in affine):
        raise PolicyError("TENT trains weight and bias of BN layers, which are offloaded here; load the model whole")
    if not affine:
        raise PolicyError("TENT trains weight and bias of BN layers, but no BN layer has any (affine=False); use adabn")
    return affine
