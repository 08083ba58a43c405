"""What must hold of config.json in timm's hub layout before anything in it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .._preprocessing import wrong_note
from ..text import shown

__all__ = ["HUB_CONFIG", "SECTION", "read_hub_config"]

HUB_CONFIG = "config.json"
SECTION = "conv2former"  # of it, with what timm has no place for
MAX_BYTES = 1 << 25  # with the names and descriptions of ImageNet-22k it has 2 million
MAX_CLASSES = 10**6


def read_hub_config(path: Path) -> dict[str, Any]:
    """Reads a config.json.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large or no JSON, or a field is wrong: says which, its value and what is allowed.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES:,} bytes")
    try:
        config = json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise ValueError("lists in lists in lists, too deep to be read") from None
    except ValueError as e:  # a broken encoding, too
        raise ValueError(f"not readable as JSON ({e})") from None
    if not isinstance(config, dict):
        raise ValueError(f"holds a {type(config).__name__}, not a timm model's configuration")
    if problem := _problem(config):
        raise ValueError(problem)
    return config


def _problem(config: dict[str, Any]) -> str:
    for key in ("pretrained_cfg", "model_args", SECTION):
        if not isinstance(config.get(key) or {}, dict):
            return f"{key} is {shown(config[key])}; expected an object of fields"
    inner = config.get("pretrained_cfg") or {}
    for prefix, fields in (("", config), ("pretrained_cfg.", inner)):
        if problem := wrong_note(fields) or _wrong_classes(fields):
            return prefix + problem
    return ""


def _wrong_classes(fields: dict[str, Any]) -> str:
    """Returns what is wrong with what a config.json says about the network's name and classes."""
    count, names = fields.get("num_classes"), fields.get("label_names")
    if count is not None and not (type(count) is int and 0 <= count <= MAX_CLASSES):
        return f"num_classes is {shown(count)}; expected a whole number from 0 to {MAX_CLASSES:,}"
    if names is not None and not (isinstance(names, list) and all(type(name) in (str, int) for name in names)):
        return f"label_names is {shown(names)}; expected a list of texts"
    if not isinstance(fields.get("label_descriptions", {}), (dict, list, type(None))):
        return f"label_descriptions is {shown(fields['label_descriptions'])}; expected an object of texts"
    name = fields.get("architecture")
    return "" if name is None or isinstance(name, str) else f"architecture is {shown(name)}; expected a text"
