"""Whether values read from a checkpoint are what this program writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["is_count", "is_number", "is_table", "or_none"]


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def is_table(value: Any) -> bool:
    """Returns whether a value is rows of numbers."""
    return isinstance(value, list) and all(isinstance(row, (list, tuple)) and all(map(is_number, row)) for row in value)


def or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)
