"""Test-time statistics: making a trained model fit unlabelled data of another domain.

Each way works on a copy; the model itself stays as it is. From the safest to the boldest:

- `adabn`: population statistics of the target data (Li et al. 2016, "Revisiting Batch Normalization For Practical
  Domain Adaptation"), once, and only as far as the stored ones leave something to gain: under `prior="auto"`,
  `choose_prior` by what predictions tell of the images (`InformationGain`); with `prior=0`, as in the paper.
- `mix`: each batch is normalised by a mixture of stored and its own statistics (Schneider et al. 2020, "Improving
  robustness against common corruptions by covariate shift adaptation"): for n samples
  `m' = N/(N+n) m + n/(N+n) m_B`, likewise the variance; N is the prior, in samples.
- `ema`: for streams and small batches, an average over the batches so far, mixed layer by layer with the stored
  statistics (Su et al. 2024, "Unraveling Batch Normalization for Realistic Test-Time Adaptation"); see `StreamEma`.
- `tent`: each batch is normalised by its own statistics, and one gradient step on the weights and biases of BN layers
  makes the predictions more certain (Wang et al. 2021, "Tent: Fully Test-Time Adaptation by Entropy Minimization").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from bnfinetune.bn.adapt.certainty import InformationGain, logits_in
from bnfinetune.bn.adapt.copying import bare_copy, switch_where
from bnfinetune.bn.adapt.ema import StreamEma
from bnfinetune.bn.adapt.tent import MIN_BATCH, Tent
from bnfinetune.bn.policy.apply import apply_policy
from bnfinetune.bn.policy.spec import BNPolicy
from bnfinetune.bn.population import population_of
from bnfinetune.bn.statistics.batches import device_of, first_batches, images_tensor, to_device
from bnfinetune.bn.statistics.precise import precise_bn
from bnfinetune.bn.statistics.prior_search import CHOICE, choose_prior
from bnfinetune.errors import PolicyError

Adaptation = Literal["none", "adabn", "mix", "ema", "tent"]
ADAPTATIONS: tuple[str, ...] = get_args(Adaptation)


def adapt_model(
    model: nn.Module,
    method: Adaptation,
    data: Iterable[Any] | None = None,
    *,
    num_samples: int | None = None,
    prior: float | Literal["auto"] = "auto",
    several: bool = False,
    mix_prior: float = 16.0,
    lr: float = 1e-3,
    passes: int = 1,
    min_batch: int = MIN_BATCH,
) -> nn.Module:
    """A copy of a model that adapts to unlabelled data; see the module's text for the methods.

    Args:
        model: a trained model with BN layers, under a policy or not.
        method: none (the model itself is returned), adabn, mix, ema or tent.
        data: unlabelled target data in any form that `precise_bn` takes, to be read more than once for several
            `passes`; needed by adabn, and by tent for more than one pass.
        num_samples: for adabn, how many samples to use; by default all, under `prior="auto"` at most 512, which are
            kept in memory.
        prior: for adabn, N in samples for which the stored statistics count, or auto.
        several: for adabn with `prior="auto"`, whether an image may be of several classes, each with its own score.
        mix_prior: for mix, N in samples; for tent, N of batches too small to adapt to.
        lr: for tent, the learning rate.
        passes: for tent, how often it may see each sample: it adapts on `passes - 1` passes over `data` here and during
            one pass of predictions, then no more.
        min_batch: for tent, the smallest batch to adapt to.

    Returns:
        A model in evaluation mode; call it like the original, batch by batch.

    Raises:
        PolicyError: unknown method, data missing, or values out of bounds.
        StatisticsError: adabn's pass failed.
    """
    if method not in ADAPTATIONS:
        raise PolicyError(f"adapt={method!r}; choose one of {', '.join(ADAPTATIONS)}")
    if method == "none":
        return model
    if data is None and (method == "adabn" or passes > 1):
        raise PolicyError(f"adapt={method!r} needs unlabelled target data before it predicts; pass data=...")
    if method == "tent":
        tent = Tent(model, lr=lr, min_batch=min_batch, mix_prior=mix_prior)
        if data is not None:
            tent.adapt(data, passes)
        return tent
    if method == "ema":
        return StreamEma(model)
    adapted = bare_copy(model)
    if method == "adabn":
        switch_where(adapted, lambda layer: population_of(layer).stats, eval_stats="running")
        _take_statistics(adapted, cast(Iterable[Any], data), num_samples, prior, several)
    else:
        apply_policy(adapted, BNPolicy(eval_stats="mix", mix_prior=mix_prior))
    return adapted


def _take_statistics(
    model: nn.Module, data: Iterable[Any], num_samples: int | None, prior: float | Literal["auto"], several: bool
) -> None:
    if prior != "auto":
        precise_bn(model, data, num_samples=num_samples, prior=prior, include_frozen=True)
        return
    device, batches = device_of(model), list(first_batches(data, num_samples or CHOICE))
    gain = InformationGain(several=several)

    def information() -> float:
        logits = []
        for batch in batches:
            images = to_device(images_tensor(batch, "adabn"), device)
            logits.append(logits_in(model(images), len(images), 'adabn with prior="auto"', "prior=0"))
        return gain(torch.cat(logits))

    with torch.no_grad():
        choose_prior(model, batches, information, include_frozen=True)
