"""The loop: groups of micro-batches, one optimizer update each, and what may happen between two of them."""
