"""Hugging Face weights to our checkpoints and back, without losing a bit; dense models made sparse.

One file a family in `families/`: how its config maps to ours, and one table of mappings from its tensors to
ours. Everything else is the same for all: tensors are checked against the model that is built from the
config before anything is written, then streamed one by one.
"""
