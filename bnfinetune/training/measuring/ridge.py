"""How well features tell classes apart: ridge regression on one-hot labels, each image predicted by all the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STRENGTHS = (1e1, 1e2, 1e3, 1e4, 1e5)


class LeftOut(NamedTuple):
    """Every image predicted by a fit on all others.

    Attributes:
        error: mean squared error, over that of the mean target: 0 for perfect predictions, about 1 for features that
            say nothing.
        predictions: (N, C), on the scale of the targets.
    """

    error: float
    predictions: Tensor


def leave_one_out(features: Tensor, targets: Tensor, strengths: Sequence[float] = STRENGTHS) -> LeftOut:
    """Ridge regression under leave-one-out, with the strength whose error is the least.

    With standardised features X and centred targets Y, `H = X (X'X + a I)^-1 X' + 1/n` and residuals `E = Y - H Y`,
    leaving image i out changes its residual to `E_i / (1 - H_ii)`, without another fit (Allen 1974, "The Relationship
    Between Variable Selection and Data Augmentation and a Method for Prediction": PRESS).

    Args:
        features: (N, F).
        targets: (N, C), such as one-hot labels.
        strengths: values of a to try.
    """
    x, y = features.double(), targets.double()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    centred = y - y.mean(0)
    values, vectors = torch.linalg.eigh(x @ x.T)
    values, along = values.clamp(min=0), vectors.T @ centred
    tried = []
    for strength in strengths:
        kept = values / (values + strength)
        residuals = centred - vectors @ (kept[:, None] * along)
        residuals /= (1 - vectors.square() @ kept - 1 / len(x))[:, None]
        tried.append(LeftOut((residuals.square().mean() / centred.square().mean()).item(), y - residuals))
    return min(tried, key=lambda found: found.error)
