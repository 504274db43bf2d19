"""Transforms that draw in both directions."""
