"""Reads one YAML file into plain types, with errors that say what to do.

Only what a configuration needs is read: nothing that could run code, and no small file that becomes large in memory.
"""

from __future__ import annotations

import math
import re
import reprlib
import stat
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .text import printable

__all__ = ["cut", "dump_yaml", "parse_yaml_value", "read_yaml", "show"]

MAX_BYTES = 100_000
MAX_DEPTH = 30


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader for plain values; a key given twice is an error instead of silently the last one."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):  # aliases of aliases grow without bound, or hold themselves
            problem = "aliases such as '*name' are not supported; write the value again"
        elif getattr(event, "tag", None):
            problem = "tags such as '!!int' are not supported; leave it out, and put text in quotes"
        elif self.depth == MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} levels deep"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool)):
                raise yaml.MarkedYAMLError(problem="a key must be a word or a number", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, takes 1e-6 for text because it has no dot, and 010, 12:30 and 2024-01-01 for the number
# 8, the number 750 and a date, which may be names of folders.
_TAG = "tag:yaml.org,2002:"
_DIGITS = r"([-+]?(([0-9][0-9_]*)?\.[0-9][0-9_]*|(0|[1-9][0-9_]*)\.?)([eE][-+]?[0-9]+)?"
_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)$",
    "float": _DIGITS + r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) in ("bool", "null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper with the loader's idea of what is text, so that what is written is read again as it was."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Writes text with control characters or line ends in one line, escaped: in two it would look like two entries."""
    style = None if printable(text) == text else '"'
    return dumper.represent_scalar(f"{_TAG}str", text, style)


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
_Dumper.add_representer(str, _represent_text)

# PyYAML lets Python's own errors through: a number of 5000 digits, a character that does not exist.
_ERRORS = (yaml.YAMLError, ValueError, OverflowError)

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxtuple = 3, 12, 12, 12
_short.maxstring = _short.maxlong = _short.maxother = 200


def dump_yaml(value: Any) -> str:
    """Returns plain types as YAML that `read_yaml` reads back as they are."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=math.inf)


def cut(text: object, limit: int = 200) -> str:
    """Returns a user's text as an error shows it: all of it unless it is very long."""
    text = str(text)
    return text if len(text) <= limit else text[:limit] + "..."


def show(value: object) -> str:
    """Returns a user's value as an error shows it: as Python writes it unless it is very long."""
    try:
        return cut(_short.repr(value))
    except ValueError:  # Python writes no more than 4300 digits
        return "a very long number"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, gives a key twice, or is not a mapping.
    """
    path = Path(path)
    try:
        text = _read_text(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:  # ValueError: also a path that holds a NUL
        problem = getattr(e, "strerror", None) or e
        raise ConfigError(f"{cut(path, 1000)}: cannot be read as text ({problem})") from None
    try:
        content = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except _ERRORS as e:
        mark = getattr(e, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {_problem(e)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found a {type(content).__name__}")
    return content


def _read_text(path: Path) -> str:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may never end
        raise OSError("not a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(f"more than {MAX_BYTES} bytes")
    return content.decode()


def _problem(error: Exception) -> str:
    return cut(getattr(error, "problem", None) or error)


def parse_yaml_value(text: str) -> Any:
    """Reads one value as a YAML file would, for `key=value` on the command line.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except _ERRORS as e:
        raise ConfigError(f"'{cut(text)}' is not a valid value: {_problem(e)}") from None
