"""Rules of the energy section: each names its keys, the values and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.config import load_config
from moe.errors import InputError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["energy.meter=command"], r"needs energy\.node_command"),
        (["energy.pue=0.9", "energy.pue_source=a"], r"energy\.pue=0\.9 is below 1"),
        (["energy.pue=1.2"], r"needs energy\.pue_source"),
        (["energy.pue_source=operator"], r"without energy\.pue"),
        (["energy.full_w_per_cpu=0.1"], r"full_w_per_cpu=0\.1 is below"),
    ],
)
def test_rule_is_broken(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(QUICKSTART, overrides, world_size=1)


def test_whole_section_is_accepted() -> None:
    overrides = [
        "energy.meter=command",
        "energy.node_command=[ipmi-watts, --node, '1']",
        "energy.pue=1.15",
        "energy.pue_source=operator, FY2026",
    ]
    energy = load_config(QUICKSTART, overrides, world_size=1).energy
    assert energy.node_command == ("ipmi-watts", "--node", "1")
