"""Typed configuration: schema, rules that join keys, YAML and overrides."""

from moe.config.load import ConfigError, dump_config, load_config
from moe.config.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "dump_config", "load_config"]
