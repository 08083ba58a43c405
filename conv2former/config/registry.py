"""The class of a configuration, by its key `task`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._yaml import show
from ..errors import ConfigError, closest
from .base import BaseConfig
from .schema import Config

__all__ = ["add_config_class", "as_classification", "config_class"]

_classes: dict[str, type[BaseConfig]] = {"classification": Config}


def add_config_class(name: str, config: type[BaseConfig]) -> None:
    """Lets `task: NAME` be checked by a class."""
    _classes[name] = config


def config_class(raw: Mapping[str, Any]) -> type[BaseConfig]:
    """Returns the class that checks a configuration, given as plain types; without the key it is a classifier's.

    Raises:
        ConfigError: there is no such task.
    """
    name = raw.get("task", "classification")
    if isinstance(name, str) and name in _classes:
        return _classes[name]
    near = closest(name, list(_classes)) if isinstance(name, str) else ""
    raise ConfigError(f"task: no task {show(name)}{near}: {', '.join(_classes)}")


def as_classification(config: BaseConfig) -> Config:
    """Returns a classifier's configuration as one.

    Raises:
        ConfigError: it is another task's.
    """
    if not isinstance(config, Config):
        raise ConfigError(f"task: {config.task}; here only task: classification can be used")
    return config
