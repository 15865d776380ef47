"""A linear probe: features that are computed once, where only the head trains."""
