"""A run's config around a converted model, for what builds models from configs."""

from __future__ import annotations

from typing import Literal

from moe.config.compare import leaves
from moe.config.load import ConfigError
from moe.config.rules import violations
from moe.config.schema import (
    DataSection,
    ModelSection,
    OptimSection,
    RunConfig,
    RunSection,
    TrainSection,
)


def run_config(model: ModelSection, *, precision: Literal["fp32", "bf16"], seq_length: int = 8) -> RunConfig:
    """A config with this model whose other values do not matter.

    Raises:
        ConfigError: the model breaks a rule; every broken one is named.
    """
    config = RunConfig(
        run=RunSection(name="convert"),
        model=model,
        data=DataSection(seq_length=seq_length),
        optim=OptimSection(lr=1.0),
        train=TrainSection(steps=1, global_batch_size=1, micro_batch_size=1, precision=precision),
    )
    broken = violations(dict(leaves(config)), world_size=None)
    if broken:
        raise ConfigError([violation.message for violation in broken])
    return config
