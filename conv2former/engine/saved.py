"""What a training checkpoint must hold, checked when it is read; before it is written, that its numbers are finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .early_stop import COLUMNS

__all__ = ["first_not_finite", "wrong_fields"]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items())
    )


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, (list, tuple)) and all(map(_is_number, row)) for row in value
    )


def _is_per_class(value: Any) -> bool:
    """Returns whether a value is (4, classes) counts as `tallies.PerClass` has them."""
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(row, list) for row in value):
        return False
    return len({len(row) for row in value}) == 1 and all(map(_is_count, (count for row in value for count in row)))


def _is_history(value: Any) -> bool:
    return _is_table(value) and all(len(row) == len(COLUMNS) for row in value)


def _has_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_plain(value: Any) -> bool:
    """Returns whether a value can be compared with another, as tensors cannot."""
    if isinstance(value, dict):
        return _has_texts(value) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def _is_plain_dict(value: Any) -> bool:
    return isinstance(value, dict) and _is_plain(value)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _of_texts(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: _has_texts(value) and all(map(check, value.values()))


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


_REQUIRED: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "epoch": _is_count,
    "model": _is_state,
    "model_ema": _or_none(_is_state),
    "optimizer": _is_optimizer,
    "scaler": _or_none(_has_texts),
    "best_metric": _or_none(_is_number),
    "class_names": _is_list_of_texts,
    "config": _of_texts(_is_plain_dict),
    "variant": _is_plain_dict,
    "plan": _is_plain_dict,
}
_OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "metric": _or_none(_is_number),
    "best_row": _or_none(lambda value: _of_texts(_is_number)(value) and _is_count(value.get("epoch"))),
    "per_class": _or_none(_is_per_class),
    "confusion": _or_none(_is_table),
    "history": _is_history,
    "losses": _or_none(_is_table),
    "skipped": _or_none(_of_texts(_of_texts(lambda value: isinstance(value, str)))),
    "seconds": _is_number,
    "kernels": _of_texts(lambda value: isinstance(value, str)),
    "started_from": _or_none(lambda value: isinstance(value, str)),
    "time": _or_none(lambda value: _of_texts(_is_number)(value) and value.keys() >= {"training", "waiting"}),
    "format": _is_count,
}


def wrong_fields(content: Mapping[str, Any]) -> list[str]:
    """Returns the names of what is missing in a training checkpoint, or is not what this program writes."""
    wrong = [key for key, check in _REQUIRED.items() if key not in content or not check(content[key])]
    return wrong + [key for key, check in _OPTIONAL.items() if key in content and not check(content[key])]


def first_not_finite(content: Mapping[str, Any]) -> str:
    """Returns the name of the first tensor in nested containers that has a number that is not finite, or ''.

    One wait for the device, however many tensors there are.
    """
    found = [(name, tensor) for name, tensor in _tensors(content, "") if tensor.is_floating_point() and tensor.numel()]
    by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in found:
        by_device.setdefault(tensor.device, []).append((name, torch.isfinite(tensor).all()))
    for pairs in by_device.values():
        verdicts = torch.stack([verdict for _, verdict in pairs]).tolist()
        for (name, _), is_finite in zip(pairs, verdicts, strict=True):
            if not is_finite:
                return name
    return ""


def _tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _tensors(inner, f"{name}.{i}")
