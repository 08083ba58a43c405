"""The average of weight files of one network, uniform or greedy.

After "Model soups" by Wortsman et al., 2022, arXiv:2203.05482.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...config import apply_overrides
from ...errors import CheckpointError, ConfigError, OutputError, shorten
from ...models import CheckpointInfo, inspect_checkpoint
from ...printing import print_lines
from ...tasks.registry import task_of
from ...weights.description import definition_in, describe_checkpoint, state_dict_of
from ...weights.installed import file_sha256
from ...weights.reading import read_checkpoint, weight_file
from ..evaluation.registry import validate_files
from ..output import check_writable, replacing

__all__ = ["average", "greedy"]

Say = Callable[[str], None]


@dataclass
class _Soup:
    """A sum of weights, in float64.

    Attributes:
        total: for each floating-point tensor the sum; other buffers are those of the first file.
        sources: what went in: file, sha256 and metric.
    """

    total: dict[str, torch.Tensor] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)

    def with_file(self, state_dict: Mapping[str, torch.Tensor], source: dict[str, Any]) -> _Soup:
        """Returns a soup with one more file in it."""
        total = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in state_dict.items()}
        if self.sources:
            total = {
                key: tensor + total[key] if tensor.is_floating_point() else tensor for key, tensor in self.total.items()
            }
        return _Soup(total, [*self.sources, source])

    def mean(self, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the average, each tensor of the type that it has in `like`."""
        count = len(self.sources)
        return {
            key: (tensor / count).to(like[key].dtype) if tensor.is_floating_point() else tensor
            for key, tensor in self.total.items()
        }


@dataclass(frozen=True)
class _First:
    """What the first file tells for all: its network, classes and images."""

    info: CheckpointInfo
    definition: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]


def average(checkpoints: Sequence[str | Path], output: Path, use_ema: bool = True, say: Say = print_lines) -> None:
    """Writes the mean of all files' weights: the uniform soup.

    Args:
        checkpoints: files of one network with the same classes, in any known layout.
        output: the file to write, which `load_model` and a configuration's `model.checkpoint` take.
        use_ema: take the averaged weights where a file has them.
        say: is told each step.

    Raises:
        CheckpointError: a file cannot be read, or the networks or classes differ.
        OutputError: the result cannot be written.
    """
    first = _check(checkpoints, output, use_ema, say)
    soup = _Soup()
    like: dict[str, torch.Tensor] = {}
    for path in checkpoints:
        like, source = _read(path, use_ema)
        soup = soup.with_file(like, source)
    _write(output, soup.mean(like), first, soup.sources, None)
    say(f"{output}: the mean of {len(checkpoints)} files")


def _check_same_images(checkpoints: Sequence[str | Path], overrides: Sequence[str]) -> None:
    """Checks that all files are evaluated on the same images: those that are given, or that all of them note.

    Raises:
        ConfigError: they are not.
    """
    keys = ("source", "root", "csv", "val_split", "holdout", "holdout_seed", "holdout_sha256")
    given = apply_overrides({}, overrides).get("data", {})
    noted = []
    for path in checkpoints:
        section = inspect_checkpoint(path).recipe.get("data")
        section = section if isinstance(section, dict) else {}
        noted.append({key: given.get(key, section.get(key)) for key in keys})
    for path, data in zip(checkpoints, noted, strict=True):
        differing = [f"data.{key}" for key in keys if data[key] != noted[0][key]]
        if differing:
            raise ConfigError(
                f"{path} and {checkpoints[0]} note other images to evaluate on ({shorten(differing)}), so their "
                "accuracies cannot be compared; give them for all, such as data.root=... data.holdout=null"
            )


def greedy(
    checkpoints: Sequence[str | Path],
    output: Path,
    overrides: Sequence[str] = (),
    use_ema: bool = True,
    say: Say = print_lines,
) -> float:
    """Writes the greedy soup: from the best file on, each is added that does not lower the accuracy on validation data.

    Args:
        checkpoints, output, use_ema, say: as for `average`.
        overrides: of the evaluation, `data.root=...`; the rest is as the files note it.

    Returns:
        Its accuracy by the measure of the task, such as top-1 or mIoU, percent.

    Raises:
        UserError: as for `average`, or the data is wrong.
    """
    first = _check(checkpoints, output, use_ema, say)
    _check_same_images(checkpoints, overrides)

    task = task_of(read_checkpoint(checkpoints[0]), checkpoints[0])
    label = task.metrics[task.headline].label

    def accuracy(path: str | Path, ema: bool) -> float:
        return float(validate_files([path], None, overrides, ema)[0][task.headline])

    scores = []
    for path in checkpoints:
        scores.append(accuracy(path, use_ema))
        say(f"{path}: {label} {scores[-1]:.2f} %")
    order = sorted(range(len(checkpoints)), key=lambda i: -scores[i])  # of equal ones the first that was given
    best = scores[order[0]]
    like, source = _read(checkpoints[order[0]], use_ema)
    soup = _Soup().with_file(like, source)
    say(f"start with {checkpoints[order[0]]}: {label} {best:.2f} %")
    with replacing(output) as temporary:
        for i in order[1:]:
            state_dict, source = _read(checkpoints[i], use_ema)
            candidate = soup.with_file(state_dict, source)
            _save(temporary, candidate.mean(like), first, candidate.sources, None)
            score = accuracy(temporary, False)
            kept = score >= best
            say(f"{'added' if kept else 'left out'} {checkpoints[i]}: {label} {score:.2f} %")
            if kept:
                soup, best = candidate, score
        _save(temporary, soup.mean(like), first, soup.sources, best)
    say(f"{output}: the mean of {len(soup.sources)} of {len(checkpoints)} files, {label} {best:.2f} %")
    return best


def _check(checkpoints: Sequence[str | Path], output: Path, use_ema: bool, say: Say) -> _First:
    """Checks that the files can be averaged; says what is worth knowing."""
    if len(checkpoints) < 2:
        raise ConfigError("give at least two weight files to average")
    files = [weight_file(path).resolve() for path in checkpoints]
    for i, file in enumerate(files):
        if file in files[:i]:
            raise ConfigError(f"{checkpoints[i]} is given twice")
    if output.resolve() in files:
        raise OutputError(f"{output} is one of the files to average; choose another --output")
    if output.suffix == ".safetensors":
        raise OutputError(f"{output}: class names and preprocessing do not fit into it; choose a name such as soup.pt")
    check_writable(output)
    first = None
    for path in checkpoints:
        content = read_checkpoint(path)
        info = describe_checkpoint(content, path)
        weights = _floats(state_dict_of(content, use_ema), path)
        if first is None:
            first = _First(info, definition_in(content), {key: tensor.shape for key, tensor in weights.items()})
            continue
        _check_same(first.info, info, checkpoints[0], path)
        odd = first.shapes.items() ^ {key: tensor.shape for key, tensor in weights.items()}.items()
        if odd:
            raise CheckpointError(
                f"{path} has other tensors than {checkpoints[0]}: {shorten(sorted({key for key, _ in odd}), 3)}"
            )
        if info.preprocessing != first.info.preprocessing:
            say(f"note: {path} notes other images ({info.preprocessing}); those of {checkpoints[0]} are noted")
    assert first is not None
    say("BatchNorm's running mean and variance are averaged too, as an approximation; counters are the first file's")
    return first


def _floats(state_dict: Mapping[str, torch.Tensor], path: object) -> dict[str, torch.Tensor]:
    """Returns what is averaged; a value that is not finite is a CheckpointError, since the mean would not be either."""
    weights = {key: tensor for key, tensor in state_dict.items() if tensor.is_floating_point()}
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds values that are not finite; leave this file out")
    return weights


def _check_same(first: CheckpointInfo, other: CheckpointInfo, a: object, b: object) -> None:
    differing = other.differences(first)
    for key in ("in_chans", "num_classes"):
        if getattr(other, key) != getattr(first, key):
            differing.append(f"{key} {getattr(other, key)} for {getattr(first, key)}")
    if differing:
        raise CheckpointError(f"{b} is not the network of {a}: {', '.join(differing)}; only equal ones can be averaged")
    names = [info.class_names for info in (first, other)]
    if None not in names and names[0] != names[1]:
        raise CheckpointError(f"{b} and {a} are for the same number of classes, but not the same class names")


def _read(path: str | Path, use_ema: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    content = read_checkpoint(path)
    info = describe_checkpoint(content, path)
    file = weight_file(path)
    source = {"file": file.name, "sha256": file_sha256(file), "weights": info.weights(use_ema), "metric": info.metric}
    return state_dict_of(content, use_ema, path), source


def _write(
    output: Path,
    state_dict: dict[str, torch.Tensor],
    first: _First,
    sources: list[dict[str, Any]],
    metric: float | None,
) -> None:
    with replacing(output) as temporary:
        _save(temporary, state_dict, first, sources, metric)


def _save(
    path: Path, state_dict: dict[str, torch.Tensor], first: _First, sources: list[dict[str, Any]], metric: float | None
) -> None:
    """Writes a weight file in this project's layout; of the recipe it has the first file's."""
    info = first.info
    untold = {key: first.definition[key] for key in ("ls_init_value",) if key in first.definition}
    content = {
        "model": state_dict,
        "class_names": info.class_names,
        "variant": {**info.definition(), **untold},
        "config": info.recipe,
        "preprocessing": info.preprocessing.to_dict(),
        "metric": metric if metric is None or math.isfinite(metric) else None,
        "averaged_from": sources,
    }
    try:
        torch.save(content, path)
    except RuntimeError as e:  # torch's word for what the system refuses, such as a full disk
        raise OutputError(f"{path.name} cannot be written ({str(e).splitlines()[0]})") from None
