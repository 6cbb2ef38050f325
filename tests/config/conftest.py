"""A small sound config, and what loading changed versions of it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe.config import ConfigError, load_config

SOUND = """\
run:
  name: test

model:
  num_layers: 4
  num_dense_layers: 1
  hidden_size: 64
  ffn_hidden_size: 128
  vocab_size: 512
  num_experts: 8
  top_k: 2
  expert_hidden_size: 32
  shared_expert_hidden_size: 32
  attention: {num_heads: 4, num_query_groups: 2}

data:
  seq_length: 64

optim:
  lr: 1e-3
  min_lr: 1e-4

train:
  steps: 10
  global_batch_size: 8
  micro_batch_size: 2
  eval_sequences: 16
"""

Problems = Callable[..., tuple[str, ...]]


@pytest.fixture
def sound_text() -> str:
    """A config that loads."""
    return SOUND


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Its file."""
    path = tmp_path / "sound.yaml"
    path.write_text(SOUND)
    return path


@pytest.fixture
def problems(sound: Path) -> Problems:
    """Load the sound file with overrides, or another text; returns the problems, none if it loads."""

    def load(*overrides: str, world_size: int | None = 1, text: str = SOUND) -> tuple[str, ...]:
        sound.write_text(text)
        try:
            load_config(sound, overrides, world_size=world_size)
        except ConfigError as error:
            return error.problems
        return ()

    return load
