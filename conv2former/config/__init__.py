"""Configurations: YAML files, checked. Needs pydantic, not torch."""

from .load import apply_overrides, check_config, differences, load_config
from .resolve import Plan, make_plan
from .schema import Config

__all__ = ["Config", "Plan", "apply_overrides", "check_config", "differences", "load_config", "make_plan"]
