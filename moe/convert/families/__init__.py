"""The families of Hugging Face models that can be converted."""

from moe.convert.families.base import Family
from moe.convert.families.registry import FAMILIES, family_named, family_of_config

__all__ = ["FAMILIES", "Family", "family_named", "family_of_config"]
