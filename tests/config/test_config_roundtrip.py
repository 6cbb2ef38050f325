"""What a run writes to its folder reads back equal; so does every recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moe.config import dump_config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sites")

# Text that some reader of YAML takes for something else.
LOOKS_LIKE_SOMETHING_ELSE = [
    *["1e-4", "1E5", "1_0e+1", "12", "017", "0x1f", "1:30", "1.5", ".5", "-3", "+1", ".inf", ".nan", "1e"],
    *["true", "Yes", "off", "null", "~", "", "2024-01-01", "<<", "=", "!x", "*a", "&a", "# a", "a: b", "- a"],
    *["{a}", "[a]", "'", '"', "a\nb", " a ", "日本", "${oc.env:HOME}", "\t", "a #b", "%a", "@a", "`a`", "|"],
]


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_reads_back_equal(tmp_path, recipe):
    _assert_reads_back(tmp_path, load_config(recipe, world_size=None))


@pytest.mark.parametrize("text", LOOKS_LIKE_SOMETHING_ELSE)
def test_text_stays_text(tmp_path, sound, text):
    config = load_config(sound)
    tracking = config.tracking.model_copy(update={"project": text})
    _assert_reads_back(tmp_path, config.model_copy(update={"tracking": tracking}))


@pytest.mark.parametrize("lr", [1e-4, 3e-05, 5e-324, 1.7976931348623157e308, 0.1, 2.0, 1e16])
def test_numbers_keep_every_bit(tmp_path, sound, lr):
    config = load_config(sound, [f"optim.lr={lr!r}", "optim.min_lr=0"])
    assert config.optim.lr == lr
    _assert_reads_back(tmp_path, config)


def test_blends_and_paths_read_back_equal(tmp_path, sound):
    blend = '[{prefix: "a b/#c"}, {prefix: ~/d, weight: 1e-3}]'
    config = load_config(sound, [f"data.train={blend}", f"data.heldout={blend}", "data.tokenizer=bytes"])
    _assert_reads_back(tmp_path, config)


def _assert_reads_back(tmp_path, config):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path, world_size=None) == config
    # Others read the file with a plain YAML 1.1 reader; it must tell them the same.
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == config.model_dump(mode="json")
