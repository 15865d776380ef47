"""Recipes compared on the user's own images: each cell and seed an ordinary run, differences paired by image."""
