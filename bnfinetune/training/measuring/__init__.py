"""Measuring a network on images: metrics, mistakes, population statistics and their drift."""
