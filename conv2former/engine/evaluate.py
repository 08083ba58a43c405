"""The one evaluation loop, exact over processes, for the trainer and for scripts/validate.py alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..data import Skipped
from ..inference import Captured
from ..tasks.task import AnyBatch, Evaluator
from .distributed import World
from .terminal import bar

__all__ = ["evaluate", "shown"]


def shown(loader: Iterable[Any], total: int, what: str, processes: int = 1, leave: bool = True) -> Iterator[Any]:
    """Goes over this process's batches; the main one shows how many images of all processes have had their turn.

    Args:
        loader: the batches.
        total: images of all processes; 0 where nobody knows, as of a stream.
        what: is being evaluated.
        processes: how many there are; they are taken to be equally far.
        leave: whether a bar stays on the terminal.
    """

    def images(batch: AnyBatch) -> int:
        return processes * (len(batch.images) + len(batch.skipped))

    return bar(loader, total or None, " images", what, images, leave=leave)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[AnyBatch],
    world: World,
    autocast: Callable[[], AbstractContextManager],
    evaluator: Evaluator,
    interrupted: Callable[[], bool] = lambda: False,
    cuda_graph: bool = True,
) -> Any:
    """Evaluates a network over all processes' shares of a data set; every process must call it.

    Args:
        model: the network; in evaluation mode afterwards.
        loader: this process's share, in batches of any size.
        world: the processes; their shares may differ in size, since nothing is exchanged before the end.
        autocast: makes the context in which the model runs.
        evaluator: counts what the network answers.
        interrupted: asked after every batch; where it is true on any process, the evaluation is given up.
        cuda_graph: capture the network on a GPU for batches of a size that comes often; the same results in less time.

    Returns:
        What the evaluator's `total` returns; None if it was interrupted.
    """
    model.eval()
    skipped: list[Skipped] = []
    stops = False
    with Captured(model, autocast, cuda_graph) as answer:
        for batch in loader:
            skipped += batch.skipped
            if len(batch.images):
                evaluator.update(answer, batch)
            world.works()
            if stops := interrupted():
                break
    world.at("the end of an evaluation")
    if any(world.gather(stops)):
        return None
    return evaluator.total(world, skipped)
