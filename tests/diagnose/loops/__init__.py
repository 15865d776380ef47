"""Ordinary training loops, written as their documentation teaches them, each with one fault that can be planted in it.

`registry.all_loops()` gives all of them; `data` what they train on, the other modules one family of loops each.
"""
