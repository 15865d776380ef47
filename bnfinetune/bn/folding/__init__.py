"""Convolutions and frozen BN layers computed as one: folded while training, or fused for good."""
