"""What checkpoints keep of a classifier's best evaluation."""

from __future__ import annotations

from typing import Any

from ..fields import is_count, is_table, or_none

__all__ = ["is_confusion", "is_per_class"]


def _is_counts(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(row, list) for row in value):
        return False
    return len({len(row) for row in value}) == 1 and all(map(is_count, (count for row in value for count in row)))


is_per_class = or_none(_is_counts)  # (4, classes) counts as `tallies.PerClass` has them
is_confusion = or_none(is_table)  # rows of counts, a row per true class
