"""From YAML files and the command line to a checked configuration.

Order, the later ones win: the schema's defaults, the files named by `base:`, the file, the overrides.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .._configs import find_config, near_recipes
from .._yaml import cut, parse_yaml_value, read_yaml, show
from ..errors import ConfigError, closest, raise_mistakes, shorten
from .auto import AUTO, is_auto
from .base import FORMS, BaseConfig
from .registry import config_class
from .suggest import suggest_key

__all__ = ["apply_overrides", "check_config", "differences", "load_config", "override_config"]

MAX_FILES = 30  # of one configuration: bases of bases can be very many
MAX_WORDS = 10  # in a dotted key


def load_config(path: str | Path | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> BaseConfig:
    """Reads a configuration.

    Args:
        path: the YAML file, or the name of a recipe, `finetune/folder`; None for the defaults alone.
        overrides: `a.b=value`, `--a.b=value`, or `--a.b` followed by the value; values are read as YAML. Or a mapping
            of plain types: `{"a.b": value}`, or nested, `{"a": {"b": value}}`.

    Raises:
        ConfigError: a file cannot be read, or there are mistakes; all are listed with their dotted paths.
    """
    raw = _read_with_bases(_existing(path), (), itertools.count()) if path else {}
    where = f"{path}{', with what is given beside it' if overrides else ''}" if path else "the configuration"
    return check_config(apply_overrides(raw, overrides), where)


def override_config(config: BaseConfig | Mapping[str, Any], overrides: Mapping[str, Any]) -> BaseConfig:
    """Returns a checked configuration from one, or from plain types, with overrides as for `load_config`.

    Raises:
        ConfigError: it has mistakes.
    """
    raw = config.to_dict() if isinstance(config, BaseConfig) else config
    if not isinstance(raw, Mapping):
        raise ConfigError(f"the configuration: expected a file's path, or plain types in a mapping, found {show(raw)}")
    return check_config(apply_overrides(raw, overrides), "the configuration")


def apply_overrides(config: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a plain, unchecked configuration with overrides applied; see `load_config`.

    Raises:
        ConfigError: an override is not `key=value`, or its key goes through something that is not a section.
    """
    raw = copy.deepcopy(dict(config))
    given = _pairs_of(overrides) if isinstance(overrides, Mapping) else _split_overrides(overrides)
    for key, value in given:
        node: Any = raw
        *parents, last = key.split(".")
        for parent in parents:
            if node.get(parent) is None:  # a section that may be null, such as train.early_stop
                node[parent] = {}
            if not isinstance(node[parent], dict):
                raise ConfigError(f"{cut(key)}: '{cut(parent)}' is not a section")
            node = node[parent]
        node[last] = value
    _read_variant_file(raw, Path())  # named on the command line: relative to the working directory
    return raw


def check_config(raw: Mapping[str, Any], where: object) -> BaseConfig:
    """Checks a configuration given as plain types.

    Raises:
        ConfigError: it has mistakes; all are listed with their dotted paths. `where` says whose they are.
    """
    mistakes: list[str] = []
    config = None
    try:
        kind = config_class(raw)
        config = kind.model_validate(dict(raw))
    except ConfigError as e:
        mistakes = list(e.lines)
    except ValidationError as e:
        mistakes = _describe_all(e.errors(), kind)
    except ValueError as e:  # pydantic lets Python's own through: it writes no number of more than 4300 digits as text
        mistakes = [str(e)]
    raise_mistakes(where, mistakes or (config.conflicts() if config else []))
    assert config is not None
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns `dotted.key: old -> new` for every value that differs between two plain configurations."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found


def _existing(name: str | Path) -> Path:
    path = find_config(name)
    near = [] if os.path.exists(path) else near_recipes(name)
    if near:
        raise ConfigError(f"{path}: no such file, and no recipe of that name; near it: {', '.join(near)}")
    return path


def _read_with_bases(path: Path, chain: tuple[Path, ...], count: Iterator[int]) -> dict[str, Any]:
    """Reads a file over its bases. Mappings are merged; all else is replaced, lists and the file of a variant too."""
    raw = read_yaml(path)  # first: what it reads can be resolved
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(p.name for p in (*chain, resolved))
        raise ConfigError(f"{chain[0]}: 'base:' goes in a circle: {cut(circle)}")
    if next(count) == MAX_FILES:
        raise ConfigError(f"{path}: 'base:' leads to more than {MAX_FILES} files")
    bases = raw.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base: expected a file name or a list of them, found {show(bases)}")
    _read_variant_file(raw, path.parent)
    layers = [_read_with_bases(find_config(base, path.parent), (*chain, resolved), count) for base in bases]
    return functools.reduce(_merge, [*layers, raw], {})


class _Whole(dict[str, Any]):
    """The content of a variant's file: a whole definition, of which nothing is taken from a base's."""


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict) and not isinstance(value, _Whole)
        merged[key] = _merge(old[key], value) if both else value
    return merged


def _read_variant_file(raw: dict[str, Any], folder: Path) -> None:
    """Replaces the path in `model.variant` by the file's content, so that a saved configuration needs no other file."""
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("variant"), str):
        path = folder / model["variant"]
        raw["model"] = {**model, "variant": _Whole({"name": path.stem, **read_yaml(path)})}


def _split_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--") or not rest:
                raise ConfigError(f"'{cut(word)}': expected key=value without blanks, for example optim.base_lr=1e-3")
            text = rest.pop(0)
        _check_key(key, word)
        if not text.strip():
            raise ConfigError(f"'{cut(word)}': no value; write {cut(key)}=null for none")
        pairs.append((key, parse_yaml_value(text)))
    return pairs


def _pairs_of(overrides: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and plain values of overrides from Python. Mappings are merged, as those in files are."""
    for name, value in overrides.items():
        key = f"{above}{name}"
        _check_key(key, key)
        if isinstance(value, Mapping):
            yield from _pairs_of(value, f"{key}.")
        else:
            yield key, _plain(value)


def _plain(value: Any) -> Any:
    """Returns what YAML would have: text for a path, a list for a tuple, a number for one of NumPy's."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def _check_key(key: str, word: str) -> None:
    parts = key.split(".")
    if not all(parts) or len(parts) > MAX_WORDS:
        raise ConfigError(f"'{cut(word)}': not a key; expected words with dots between, for example optim.base_lr")


def _describe_all(errors: Sequence[Any], kind: type[BaseConfig]) -> list[str]:
    """Returns a line for each mistake; a key that is missing because its name is misspelt is the misspelling alone."""
    lines = [_describe(error, kind) for error in errors]
    unknown = [line for line, error in zip(lines, errors, strict=True) if error["type"] == "extra_forbidden"]

    def is_meant(error: Any) -> bool:
        if error["type"] != "missing":
            return False
        *section, name = map(str, _location(error))
        prefix, meant = ".".join([*section, ""]), f"(did you mean '{name}'?)"
        return any(line.startswith(prefix) and line.endswith(meant) for line in unknown)

    return [line for line, error in zip(lines, errors, strict=True) if not is_meant(error)]


def _valid_keys(location: Sequence[str | int], kind: type[BaseConfig]) -> list[str]:
    """Returns the keys of the section that holds the last word of `location`."""
    section: type[BaseModel] = kind
    for word in location[:-1]:
        annotation = section.model_fields[str(word)].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        section = inner[0]
    return list(section.model_fields)


def _location(error: Any) -> list[str | int]:
    """Returns the words of a mistake's key."""
    return [word for word in error["loc"] if word not in FORMS]


def _describe(error: Any, kind: type[BaseConfig]) -> str:
    location = _location(error)
    dotted = cut(".".join(str(word) for word in location))
    if error["type"] == "extra_forbidden":
        keys = _valid_keys(location, kind)
        hint = closest(location[-1], keys) if len(location) > 1 else ""
        meant = "" if hint else suggest_key(dotted, kind=kind)
        hint = hint or (f" (did you mean '{meant}'?)" if meant else closest(location[-1], keys))
        return f"{dotted}: unknown key{hint or '; valid: ' + ', '.join(keys)}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if dotted in kind.auto_keys:
        message += f", or '{AUTO}'"
    example = suggest_key(dotted, kind=kind) if dotted in kind.model_fields else ""
    hint = f"; its keys are set one by one, such as {example}" if example else ""
    if location and not example and error["type"] in ("model_type", "model_attributes_type"):
        keys = [f"{dotted}.{key}" for key in _valid_keys([*location, ""], kind)]
        return f"{dotted}: a section, found {show(error['input'])}; its keys are set one by one: {shorten(keys, 5)}"
    if is_auto(error["input"]) and not example:
        allowed = ", ".join(kind.auto_keys)
        hint = f"; what can be {AUTO}: {allowed}" if allowed else f"; this task has no key that can be {AUTO}"
    return f"{dotted}: {message}, found {show(error['input'])}{hint}"
