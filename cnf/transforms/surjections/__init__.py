"""Surjections: transforms that are drawn in one of their directions."""
