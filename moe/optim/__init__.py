"""Optimizers of our own, in plain torch: Muon for matrices, and QK-clip."""
