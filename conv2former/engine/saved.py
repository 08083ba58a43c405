"""What a training checkpoint must hold, checked when it is read; before it is written, that its numbers are finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..tasks.fields import is_count, is_number, is_table, or_none
from ..tasks.registry import task_in
from ..tasks.task import Task
from .early_stop import columns

__all__ = ["first_not_finite", "forget_best", "wrong_fields"]


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


def _of_texts(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: _has_texts(value) and all(map(check, value.values()))


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_config(value: Any) -> bool:
    """Returns whether a value is sections of plain types, and perhaps the name of a task."""
    if not isinstance(value, dict) or not isinstance(value.get("task", ""), str):
        return False
    return _of_texts(_is_plain_dict)({key: section for key, section in value.items() if key != "task"})


_REQUIRED: dict[str, Callable[[Any], bool]] = {
    "step": is_count,
    "epoch": is_count,
    "model": _is_state,
    "model_ema": or_none(_is_state),
    "optimizer": _is_optimizer,
    "scaler": or_none(_has_texts),
    "best_metric": or_none(is_number),
    "class_names": _is_list_of_texts,
    "config": _is_config,
    "variant": _is_plain_dict,
    "plan": _is_plain_dict,
}
_OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "metric": or_none(is_number),
    "best_row": or_none(lambda value: _of_texts(is_number)(value) and is_count(value.get("epoch"))),
    "history": is_table,
    "losses": or_none(is_table),
    "skipped": or_none(_of_texts(_of_texts(lambda value: isinstance(value, str)))),
    "seconds": is_number,
    "kernels": _of_texts(lambda value: isinstance(value, str)),
    "started_from": or_none(lambda value: isinstance(value, str)),
    "time": or_none(lambda value: _of_texts(is_number)(value) and value.keys() >= {"training", "waiting"}),
    "format": is_count,
}


def wrong_fields(content: Mapping[str, Any], task: Task) -> list[str]:
    """Returns the names of what is missing in a training checkpoint, or is not what this program writes.

    Args:
        content: the checkpoint.
        task: of it.
    """
    wrong = [key for key, check in _REQUIRED.items() if key not in content or not check(content[key])]
    optional = {**_OPTIONAL, **task.details}
    wrong += [key for key, check in optional.items() if key in content and not check(content[key])]
    rows = content.get("history", [])
    whole = len(columns(task.metrics))
    if "history" not in wrong and {len(row) for row in rows} not in (set(), {whole}, {whole - len(task.optional)}):
        wrong.append("history")
    return wrong


def forget_best(content: dict[str, Any]) -> None:
    """Makes a training checkpoint that of a run which has no best weights yet."""
    for key in ("best_metric", "best_row", *task_in(content).details):
        content[key] = None


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
