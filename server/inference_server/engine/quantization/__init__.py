"""Fewer bits for weights: formats, rounding to them, and the variants of a model that are kept beside its master."""
