"""The network of a run: backbone and head, what its BatchNorm layers do, and the optimizer of its parameters."""
