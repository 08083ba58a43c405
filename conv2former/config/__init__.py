"""Configurations: YAML files, checked. Needs pydantic, not torch."""

try:
    import pydantic  # noqa: F401
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
        'training and evaluation need more packages: pip install "conv2former[train]"', name=e.name
    ) from e

from .base import BaseConfig
from .load import apply_overrides, check_config, differences, load_config, override_config
from .resolve import Plan, fit_auto, fit_batch, img_size_at, make_plan
from .schema import Config

__all__ = [
    "BaseConfig",
    "Config",
    "Plan",
    "apply_overrides",
    "check_config",
    "differences",
    "fit_auto",
    "fit_batch",
    "img_size_at",
    "load_config",
    "make_plan",
    "override_config",
]
