"""Evaluates checkpoints one after the other, over all processes, whatever their task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ...config.base import BaseDataConfig, BaseTrainConfig
from ...engine.build import autocast_for
from ...engine.distributed import World, join_world
from ...engine.evaluate import evaluate, shown
from ...engine.skipped import SkippedImages
from ...errors import ConfigError, DataError, before_processes_meet
from ...tasks.task import Evaluator, Split
from .files import NOT_FINITE, check_folder, folders_of, write_results

__all__ = ["Announce", "Prepared", "measure", "run_evaluations"]

Announce = Callable[[list[dict[str, Any]]], None]


class Prepared(Protocol):
    """A checkpoint that is ready to be evaluated: all that could be a mistake has been found."""

    @property
    def path(self) -> Path:
        """Of the checkpoint."""

    @property
    def views(self) -> Sequence[str]:
        """Names of the ways in which its images are prepared, each a row of the results."""

    @property
    def timeout_minutes(self) -> float:
        """For which a process lets the others wait."""

    @property
    def signature(self) -> Any:
        """What has to be the same on all processes."""

    def known(self, world: World) -> list[dict[str, Any]]:
        """Returns the rows as far as they are known before the evaluation."""

    def evaluate(self, world: World) -> tuple[Sequence[Any], dict[str, Any]]:
        """Returns the result of each row, and what all rows have in common; lets the network go."""

    def row(self, known: dict[str, Any], result: Any) -> dict[str, Any]:
        """Returns a row with its metrics."""

    def write(self, folder: Path, row: dict[str, Any], result: Any) -> dict[str, Any]:
        """Writes the files that were asked for, and returns what to add to the row: `files`, and more."""


def run_evaluations(
    prepare: Callable[[], Sequence[Prepared]], folder: Path | None, announce: Announce | None
) -> list[dict[str, Any]]:
    """Evaluates checkpoints; under torchrun every process calls it.

    Args:
        prepare: returns them, at least one.
        folder: for results.json, results.csv and further files; None for none.
        announce: called on the main process before the first image is read, with the rows as far as they are known.

    Returns:
        A row for each checkpoint and view, the same on all processes but for `files`, which only the main one has.

    Raises:
        UserError: something is wrong.
    """
    world = World.from_environment()
    with before_processes_meet():
        prepared = prepare()
    rows: list[dict[str, Any]] = []
    with join_world(world, prepared[0].timeout_minutes) as world:
        _check_agreement(prepared, world)
        if folder:
            world.on_main(partial(check_folder, folder))
        if announce and world.is_main:
            announce([row for one in prepared for row in one.known(world)])
        folders = folders_of(folder, [(one.path, view) for one in prepared for view in one.views])
        for one in prepared:
            results, shared = one.evaluate(world)
            first = len(rows)
            pairs = zip(one.known(world), results, strict=True)
            rows += [_noted(one.row(row, result)) | shared for row, result in pairs]
            if folder:  # after every file, so that nothing is lost if a later one fails
                world.on_main(partial(_write, one, results, rows, first, folders, folder))
    return rows


def _noted(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with a note if its loss, where there is one, is no number."""
    return row if math.isfinite(row.get("loss", 0.0)) else {**row, "notes": [*row["notes"], NOT_FINITE]}


def _check_agreement(prepared: Sequence[Prepared], world: World) -> None:
    """Checks that all processes have found the same images and classes on their machines.

    Raises:
        ConfigError: they have not.
    """
    found = world.gather([one.signature for one in prepared])
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise ConfigError(f"rank {rank} has found other checkpoints, images or classes than rank 0")


def _write(
    one: Prepared, results: Sequence[Any], rows: list[dict[str, Any]], first: int, folders: Sequence[Path], folder: Path
) -> None:
    """Writes the files of one checkpoint's rows, which begin at `first`, and the results so far."""
    for row, result, place in zip(rows[first:], results, folders[first:], strict=False):
        row |= one.write(place, row, result)
    write_results(folder, rows)


def measure(
    model: nn.Module,
    loader: Iterable[Any],
    evaluator: Evaluator,
    source: Split,
    path: Path,
    data: BaseDataConfig,
    train: BaseTrainConfig,
    world: World,
) -> tuple[list[Any], dict[str, Any]]:
    """Evaluates a network on all processes, with a bar.

    Args:
        model: the network, on any device.
        loader: of this process's share of the images.
        evaluator: counts what it answers.
        source: the images.
        path: of the checkpoint.
        data: what is done about unreadable images.
        train: precision and CUDA graphs.
        world: the processes.

    Returns:
        What the evaluator found, in a list, and of a row `seconds`, `images_per_second` and `skipped`.

    Raises:
        DataError: too many images cannot be read, or there is none.
    """
    start = time.perf_counter()
    loaded = shown(loader, len(source), path.name, world.size)  # of a stream 0
    model.to(world.device)
    uses_graph = train.cuda_graph != "off"
    autocast = autocast_for(train.precision, world.device)[1]
    found = evaluate(model, loaded, world, autocast, evaluator, cuda_graph=uses_graph)
    seconds = max(world.gather(time.perf_counter() - start))
    assert found is not None
    results = found if isinstance(found, list) else [found]
    n = int(results[0].metrics["n"])
    skipped = SkippedImages(data, world, [""])
    skipped.note("", results[0].skipped)
    reasons = skipped.exchange()
    skipped.check("", n + len(skipped))
    if not n:
        error = DataError(f"{source.name}: {'not one image could be read' if reasons else 'there are no images'}")
        error.scope = "run"
        raise error
    return results, {
        "seconds": round(seconds, 3),
        "images_per_second": round(n / max(seconds, 1e-9), 1),
        "skipped": reasons,
    }
