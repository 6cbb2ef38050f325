"""Which layers each stage of the pipeline holds: chunks of the model in order, chunk i on stage i % pp."""

from __future__ import annotations

from moe.config.schema import ModelSection, ParallelSection
from moe.counts.shape import shape_of
from moe.counts.stages import chunk_layers


def layers_of_chunks(model: ModelSection, parallel: ParallelSection) -> tuple[int, ...]:
    """Decoder layers of each of the pp * vpp chunks, in the order of the model.

    What the config says; else balanced by the work of a token, the output layer and multi-token prediction of
    the last chunk included, as `moe plan` assumes.

    Args:
        model: sizes.
        parallel: sizes that moe/config/rules.py has checked.
    """
    return parallel.stage_layers or chunk_layers(shape_of(model), parallel.pp, parallel.vpp)


def megatron_layout(model: ModelSection, parallel: ParallelSection) -> list[list[str]]:
    """The same in Megatron's words (pipeline_model_parallel_layout), with embedding, MTP and loss."""
    rows = [["decoder"] * layers for layers in layers_of_chunks(model, parallel)]
    rows[0].insert(0, "embedding")
    rows[-1] += ["mtp"] * model.mtp_layers + ["loss"]
    return rows
