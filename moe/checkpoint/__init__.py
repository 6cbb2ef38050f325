"""Checkpoints: shards of every rank under one manifest, verified before they are read."""
