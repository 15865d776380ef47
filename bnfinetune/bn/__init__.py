"""The BatchNorm core: one layer with independent switches, usable alone in anybody's training loop."""

from bnfinetune.bn.layers import find_bn_layers, register_bn_class

__all__ = ["find_bn_layers", "register_bn_class"]
