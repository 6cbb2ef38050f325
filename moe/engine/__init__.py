"""Engines: the libraries that carry the parallel training of a model."""
