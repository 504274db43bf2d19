"""A flow as a distribution and a transform of torch."""
