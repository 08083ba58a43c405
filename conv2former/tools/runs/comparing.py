"""Whether two runs are the same: what they logged, and what their checkpoints hold, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.checkpoint import read_training_checkpoint
from ...engine.logging import read_metrics
from ...errors import CheckpointError, ConfigError, counted
from ..output import text_table

__all__ = ["Part", "compare_runs", "comparison_text", "differing", "differing_runs", "metrics_of"]

TIMING = ("images_per_second", "data_wait", "memory_gib")  # what no two runs have the same
STATE = (
    "step", "epoch", "model", "model_ema", "optimizer", "scaler", "metric", "best_metric", "best_row", "per_class",
    "confusion", "history", "losses",
)  # fmt: skip
_ABSENT = object()


@dataclass(frozen=True)
class Part:
    """What came out for one file of two runs.

    Attributes:
        name: of the file; the names where the runs have it under several, or each under another.
        compared: what was compared, `150 tensors, 40 values`.
        different: how many of these are not the same.
        first: the first that is not, and how far apart it is; '' if there is none.
    """

    name: str
    compared: str
    different: int
    first: str


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl without speeds and memory."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def differing(first: Any, second: Any) -> list[str]:
    """Returns the places at which two nested structures of tensors and built-in types are not equal bit for bit."""
    return _different(dict(_leaves(first)), dict(_leaves(second)))


def differing_runs(first: Path, second: Path) -> list[str]:
    """Returns the first difference in each file that two runs do not have the same; see `compare_runs`."""
    return [f"{part.name}: {part.first}" for part in compare_runs(first, second) if part.different]


def compare_runs(first: Path, second: Path) -> list[Part]:
    """Compares two runs: metrics.jsonl without speeds and memory, the newest checkpoint, last.pt and best.pt.

    Of a checkpoint those things are compared that decide how the run goes on: weights, averages, optimizer, the best
    so far; not its times, versions and configuration. What only the version of one run writes down is left out.

    Args:
        first, second: run folders.

    Returns:
        The results, metrics.jsonl first.

    Raises:
        ConfigError: one is not a run folder, has logged nothing, or is the same as the other.
        CheckpointError: one has no checkpoint, or one that is damaged.
    """
    files = [_files(run) for run in (first, second)]
    if first.samefile(second):
        raise ConfigError(f"{first} and {second} are the same folder; give two runs")
    parts = [_compare_metrics(first, second)]
    for name, a, b in _pairs(*files):
        if a is None or b is None:
            parts.append(Part(name, "nothing", 1, f"only in {'B' if a is None else 'A'}"))
        else:
            parts.append(_compare_checkpoints(name, a, b))
    return parts


def comparison_text(names: tuple[str, str], parts: list[Part]) -> str:
    """Returns what a person is told: a table of what was compared, the first difference of each file, the verdict.

    Args:
        names: what the two runs are called.
        parts: from `compare_runs`.
    """
    rows = [[part.name, part.compared, str(part.different) if part.different else "none"] for part in parts]
    first = [f"first difference in {part.name}:\n  {part.first}" for part in parts if part.different]
    verdict = "the runs differ" if first else "the runs are identical, bit for bit"
    heads = [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)]
    return "\n".join([*heads, "", text_table(["file", "compared", "differences"], rows), "", *first, verdict])


# ------------------------------------------------------------------------------------------------------- the files


def _files(run: Path) -> dict[str, Path]:
    """Returns the checkpoints of a run by what they are.

    Raises:
        ConfigError: it is not a run folder, or has logged nothing.
        CheckpointError: there is none.
    """
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; give the folder of a run, with metrics.jsonl in it")
    if not read_metrics(run / "metrics.jsonl"):
        raise ConfigError(f"{run}: no run, or one that has logged nothing yet: there are no rows in metrics.jsonl")
    folder = run / "checkpoints"
    steps = sorted(folder.glob("step_*.pt"))
    found = {"newest": steps[-1]} if steps else {}
    found |= {name: folder / name for name in ("last.pt", "best.pt") if (folder / name).is_file()}
    if not found:
        raise CheckpointError(f"{run} has no checkpoints yet: there are no weights to compare")
    return found


def _pairs(first: dict[str, Path], second: dict[str, Path]) -> list[tuple[str, Path | None, Path | None]]:
    """Returns what to compare with what: a name, and the file of each run, or None. The same two only once."""
    found: dict[Any, list[tuple[str, Path | None, Path | None]]] = {}
    for role in dict.fromkeys([*first, *second]):
        a, b = first.get(role), second.get(role)
        name = " / ".join(dict.fromkeys(path.name for path in (a, b) if path))
        same = tuple(path and (path.stat().st_dev, path.stat().st_ino) for path in (a, b))  # hard links
        found.setdefault(same, []).append((name, a, b))
    return [(", ".join(name for name, _, _ in alike), *alike[0][1:]) for alike in found.values()]


def _compare_metrics(first: Path, second: Path) -> Part:
    rows = [{(row["step"], row["kind"]): row for row in metrics_of(run)} for run in (first, second)]
    order = sorted({*rows[0], *rows[1]}, key=lambda place: (place[0], place[1] != "train"))
    values: list[dict[str, Any]] = [{}, {}]
    for step, kind in order:
        for mine, found in zip(rows, values, strict=True):
            row = mine.get((step, kind), {})
            found |= {f"step {step}, {kind}, {key}": row[key] for key in row if key not in ("step", "kind")}
    common = rows[0].keys() & rows[1].keys()
    numbers = values[0].keys() & values[1].keys()
    compared = f"{counted(len(common), 'row')}, {counted(len(numbers), 'number')}"
    return _part("metrics.jsonl", compared, values[0], values[1], lambda name: int(name.split(",")[0].split()[1]))


def _compare_checkpoints(name: str, first: Path, second: Path) -> Part:
    contents = [read_training_checkpoint(path) for path in (first, second)]
    known = [key for key in STATE if all(key in content for content in contents)]
    a, b = (dict(_leaves({key: content[key] for key in known})) for content in contents)
    common = [a[place] for place in a if place in b]
    tensors = sum(isinstance(value, Tensor) for value in common)
    compared = f"{counted(tensors, 'tensor')}, {counted(len(common) - tensors, 'other value')}"
    return _part(name, compared, a, b)


def _part(
    name: str, compared: str, a: dict[str, Any], b: dict[str, Any], order: Callable[[str], int] | None = None
) -> Part:
    """Returns what came out for values by their places, of which the first is the one with the least `order`."""
    places = _different(a, b)
    if order:
        places = sorted(places, key=order)
    first = f"{places[0]}: {_difference(a.get(places[0], _ABSENT), b.get(places[0], _ABSENT))}" if places else ""
    return Part(name, compared, len(places), first)


# ------------------------------------------------------------------------------------------------------- the values


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Gives the tensors and plain values in nested containers, and where they are; an empty container is a value."""
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    if not inner:
        yield place, value
    for key, part in inner or ():
        yield from _leaves(part, f"{place}.{key}".lstrip("."))


def _different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [place for place in {**a, **b} if place not in a or place not in b or not _is_same(a[place], b[place])]


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
    return type(a) is type(b) and repr(a) == repr(b)  # of which 0.0 and -0.0 have two


def _bytes(x: Tensor) -> Tensor:
    """Returns the bytes of a tensor, (numbers, bytes of each)."""
    flat = x.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)  # one number may have any stride
    return flat.view(torch.uint8).view(x.numel(), x.element_size())


def _difference(a: Any, b: Any) -> str:
    """Returns how two values differ, either of them perhaps `_ABSENT`."""
    if a is _ABSENT or b is _ABSENT:
        return f"only in {'B' if a is _ABSENT else 'A'}"
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        kinds = [f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in (a, b)]
        if kinds[0] != kinds[1]:
            return f"{kinds[0]} in A, {kinds[1]} in B"
        count = int((_bytes(a) != _bytes(b)).any(1).sum())
        return f"{count:,} of {counted(a.numel(), 'number')} differ, by at most {_distance(a.double(), b.double())}"
    texts = f"{_shown(a)} in A, {_shown(b)} in B"
    if {type(a), type(b)} <= {int, float}:
        return f"{texts}, which differ by {_distance(_double(a), _double(b))}"
    return texts


def _distance(a: Tensor, b: Tensor) -> str:
    """Returns the largest absolute and the largest relative difference of numbers."""
    gap = (a - b).abs()
    share = torch.where(gap > 0, gap / torch.maximum(a.abs(), b.abs()), 0.0)
    return f"{float(gap.max()):.3g} (relative: {float(share.max()):.3g})"


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _double(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)
