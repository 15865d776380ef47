"""Training: from a recipe to a fine-tuned network. `run.py` reads as the whole way; each step is one module."""
