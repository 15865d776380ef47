"""How well features tell classes apart: ridge regression on one-hot labels, each image predicted by all the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRENGTHS = (1e1, 1e2, 1e3, 1e4, 1e5)


def leave_one_out_error(features: Tensor, targets: Tensor, strengths: Sequence[float] = STRENGTHS) -> float:
    """Mean squared error of ridge regression under leave-one-out, over that of the mean target.

    With standardised features X and centred targets Y, `H = X (X'X + a I)^-1 X' + 1/n` and residuals `E = Y - H Y`,
    leaving image i out changes its residual to `E_i / (1 - H_ii)`, without another fit (Allen 1974, "The Relationship
    Between Variable Selection and Data Augmentation and a Method for Prediction": PRESS). The best strength a counts.

    Args:
        features: (N, F).
        targets: (N, C), such as one-hot labels.
        strengths: values of a to try.

    Returns:
        0 for perfect predictions, about 1 for features that say nothing.
    """
    x, y = features.double(), targets.double()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    y = y - y.mean(0)
    values, vectors = torch.linalg.eigh(x @ x.T)
    values, along = values.clamp(min=0), vectors.T @ y
    errors = []
    for strength in strengths:
        kept = values / (values + strength)
        residuals = y - vectors @ (kept[:, None] * along)
        leverage = vectors.square() @ kept + 1 / len(x)
        errors.append((residuals / (1 - leverage)[:, None]).square().mean() / y.square().mean())
    return torch.stack(errors).min().item()
