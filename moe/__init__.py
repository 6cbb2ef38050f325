"""JouleMoE: sparse Mixture-of-Experts training, with tokens per joule measured."""

__version__ = "0.1.0"
