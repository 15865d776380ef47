"""BN classes with a forward of their own: frozen ones that compute nothing but BN, and some that only seem to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Buffers(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def affine(self, eps: float) -> tuple[Tensor, Tensor]:
        scale = (self.weight * (self.running_var + eps).rsqrt()).reshape(1, -1, 1, 1)
        return scale, self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale


class Detectron(_Buffers):
    """As detectron2's: eps as an attribute, and another way to compute where gradients are needed."""

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__(channels)
        self.num_features, self.eps = channels, eps
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale, shift = self.affine(self.eps)
            return x * scale.to(x.dtype) + shift.to(x.dtype)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class Detr(_Buffers):
    """As DETR's: eps within the forward."""

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine(1e-5)
        return x * scale + shift


class Renamed(_Buffers):
    """eps under another name, different from layer to layer."""

    def __init__(self, channels: int, epsilon: float = 0.02) -> None:
        super().__init__(channels)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine(self.epsilon)
        return x * scale + shift


class WithoutEps(_Buffers):
    """As maskrcnn-benchmark's: nothing is added to the variance."""

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine(0.0)
        return x * scale + shift


LOOK_ALIKES = {Detectron: 1e-3, Detr: 1e-5, Renamed: 0.02, WithoutEps: 0.0}


class Rectified(Detr):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OutsideTheRoot(_Buffers):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.view(1, -1, 1, 1), self.running_var.view(1, -1, 1, 1)
        return (x - mean) / (var.sqrt() + 1e-3) * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class FrozenInEvaluation(Detr):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True) if self.training else super().forward(x)


class Counting(Detr):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.running_mean.add_(1)
        return y


class WithAChild(Detr):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.Identity()


OTHERS = (Rectified, OutsideTheRoot, FrozenInEvaluation, Counting, WithAChild)
