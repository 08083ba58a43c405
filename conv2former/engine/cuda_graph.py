"""Forward pass, loss and backward pass of a training step as a CUDA graph, bit for bit what is computed without.

What is captured is a microbatch: the images of one accumulation step, from images and targets on the GPU to gradients.
Mixup and all that follows the gradients, such as clipping, the optimizer and the average, stay outside. So do random
numbers, in effect: `prepare_batch` seeds the generator for each microbatch, and a replay reads seed and offset from it
when it starts (torch has done so since 2.0), so that drop path and dropout draw what they would without a graph.

The microbatches with which a shape is warmed up are those of real steps, and capturing computes nothing, so nothing is
thrown away and nothing has to be restored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _private, graphs
from ..config import BaseConfig
from ..errors import ConfigError, first_line
from ..graphs import Graph, Layout, Places, Recorder, layout_of
from ..models.fusion import has_hooks
from ..tasks.registry import find_task
from .distributed import World

__all__ = ["StepGraphs", "plan_graphs"]

Compute = Callable[[Tensor, Tensor], Tensor]
Key = tuple[Layout, Layout, int]

WARM_UP = 3  # microbatches of a shape before it is captured
WARM_UP_DDP = 11  # DDP rebuilds its buckets in the second, and measures itself in the first ten
SHAPES = 4  # kept at a time: whole batches in full steps and in an epoch's shorter last one, others with fewer


@dataclass
class _Captured:
    """A microbatch's graph, and the gradients that it writes: one for each parameter, or None."""

    graph: Graph
    gradients: list[Tensor | None]
    places: Places


class StepGraphs:
    """Computes microbatches, through a graph where their shape has been captured.

    Args:
        model: whose weights are read.
        parameters: that are trained.
        recorder: captures.
        alone: whether this is the only process.
        required: whether it is an error that something cannot be captured.

    Attributes:
        say: takes a line for the log.
        warm_up: microbatches of a shape that are computed before it is captured.
        stopped: why nothing is captured any more, '' as long as it is.
        shapes: all that have been captured, whether they still are or not.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        recorder: Recorder,
        alone: bool = True,
        required: bool = False,
    ) -> None:
        self.recorder = recorder
        self.say: Callable[[str], object] = lambda line: None
        self.stopped = ""
        self.shapes: set[Key] = set()
        self.warm_up = WARM_UP if alone else WARM_UP_DDP
        self._model, self._parameters, self._alone, self._required = model, list(parameters), alone, required
        self._graphs: dict[Key, _Captured] = {}  # in the order of their last use
        self._warmed: Counter[tuple[Layout, Layout]] = Counter()
        self._sums: dict[nn.Parameter, Tensor] = {}  # of the gradients of accumulation steps

    def __call__(self, compute: Compute, images: Tensor, targets: Tensor, count: int) -> Tensor:
        """Computes a microbatch, adds its gradients to those that there are, and returns its loss.

        The loss, scalar, may be overwritten by the next call, and so may the gradients if `count` is 1.

        Args:
            compute: from images and targets to the loss, detached. It adds gradients, and depends on nothing but what
                is in tensors that stay, and `count`.
            images: (N, channels, H, W), on the device.
            targets: (N,) or (N, classes).
            count: microbatches of the step.

        Raises:
            ConfigError: it cannot be captured, and must be.
        """
        key = (layout_of(images), layout_of(targets), count)
        if not self.stopped and self._warmed[key[:2]] < self.warm_up:
            self._warmed[key[:2]] += 1
            if self._crowds():
                self.reset()
            return self.recorder.warm_up(lambda: compute(images, targets))
        captured = None if self.stopped else self._graph_of(key, compute, images, targets)
        if captured is None:
            return compute(images, targets)
        # The graphs share memory, so what one has computed is taken before another is replayed: sums of gradients are
        # copies, and those of a step of one microbatch are used before the next step.
        loss = captured.graph(images, targets)
        self._add(captured.gradients, count)
        return loss

    def _graph_of(self, key: Key, compute: Compute, images: Tensor, targets: Tensor) -> _Captured | None:
        """Returns what is captured of a shape, now or before; None where nothing can be, or can be used, any more."""
        captured = self._graphs.get(key)
        if self.recorder.broken:  # by another capture, such as an evaluation's
            self._stop(self.recorder.broken)
            return None
        if captured is None:
            captured = self._capture(compute, images, targets)
        elif not captured.places.hold():
            self._stop("the optimizer has put weights elsewhere in memory, where a graph does not see them")
            return None
        if captured is not None:
            self.shapes.add(key)
            self._graphs.pop(key, None)
            self._graphs[key] = captured
            if len(self._graphs) > SHAPES:
                self._graphs.pop(next(iter(self._graphs))).graph.reset()
        return captured

    def _capture(self, compute: Compute, images: Tensor, targets: Tensor) -> _Captured | None:
        """Captures a microbatch without computing it; the gradients of those before it stay as they are."""
        before, reason = [parameter.grad for parameter in self._parameters], ""
        try:
            places = Places(self._model)
            for parameter in self._parameters:
                parameter.grad = None  # so that the backward pass writes new ones, into the graph's memory
            graph = Graph(self.recorder, compute, images, targets)
            return _Captured(graph, [parameter.grad for parameter in self._parameters], places)
        except Exception as error:  # whatever it is: the microbatch is computed all the same, and may tell more
            reason = first_line(error)
        finally:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient
        self._stop(reason)  # not above, where the error's traceback holds the memory that this gives back
        return None

    def _stop(self, reason: str) -> None:
        """Gives up all graphs.

        Raises:
            ConfigError: they are required.
        """
        self.stopped = reason
        self.reset()
        if self._required:
            raise ConfigError(f"train.cuda_graph: on, but a step cannot be captured: {reason}. Set it to auto or off")
        self.say(f"warning: CUDA graphs: {reason}; the run goes on without, with the same results")

    def _add(self, gradients: Sequence[Tensor | None], count: int) -> None:
        """Adds a replay's gradients to those of the step, in the order in which autograd would."""
        pairs = [(p, g) for p, g in zip(self._parameters, gradients, strict=True) if g is not None]
        new = [(parameter, gradient) for parameter, gradient in pairs if parameter.grad is None]
        sums = [(parameter.grad, gradient) for parameter, gradient in pairs if parameter.grad is not None]
        if sums:
            _private.add_all([total for total, _ in sums], [gradient for _, gradient in sums])
        if count > 1 and new:  # the next replay writes into these gradients
            for parameter, gradient in new:
                if parameter not in self._sums:
                    self._sums[parameter] = torch.empty_like(gradient)
            kept = [(parameter, self._sums[parameter]) for parameter, _ in new]
            _private.copy_all([total for _, total in kept], [gradient for _, gradient in new])
            new = kept
        for parameter, gradient in new:
            parameter.grad = gradient

    def _crowds(self) -> bool:
        """Returns whether what is computed without a graph may lack memory, which graphs keep when they do not run.

        One process among several cannot capture anew without the others, so it keeps what it has.
        """
        return bool(self._graphs) and self._alone and self.recorder.is_short_of_memory()

    def make_room(self) -> None:
        """Gives up all graphs, between two steps, if an evaluation may lack memory; later steps capture anew."""
        if self._crowds():
            for parameter in self._parameters:
                parameter.grad = None  # which are in the graphs' memory
            self.reset()

    def reset(self) -> None:
        """Gives up all graphs and their memory, which must be before the process group ends."""
        for captured in self._graphs.values():
            captured.graph.reset()
        self._graphs.clear()
        self._sums.clear()
        self.recorder.close()


def plan_graphs(config: BaseConfig, world: World, model: nn.Module) -> tuple[StepGraphs | None, str]:
    """Returns what computes the microbatches of a run through graphs, or None, and a line about it for the log.

    The line is empty where there is no GPU. A compiled network is captured like any other: `torch.compile` in its
    default mode makes kernels and no graphs of its own, and compiles them at the microbatches that warm up.

    Args:
        config: the run.
        world: the processes.
        model: the network, on its device.

    Raises:
        ConfigError: it must be captured and cannot.
    """
    recorder, mode = graphs.recorder_for(world.device), config.train.cuda_graph
    if recorder is None:
        return None, ""
    if mode == "off":
        return None, "CUDA graphs: off (train.cuda_graph)"
    reason = find_task(config).no_graph or _obstacle(config, world, model)
    if reason and mode == "on":
        raise ConfigError(f"train.cuda_graph: on, but {reason}; set it to auto or off")
    if reason:
        return None, f"CUDA graphs: not used: {reason}"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = StepGraphs(model, trained, recorder, world.size == 1, mode == "on")
    return made, (
        f"CUDA graphs: after {made.warm_up} batches of a shape its forward and backward pass are recorded, and then "
        "replayed without Python, with the same numbers (train.cuda_graph)"
    )


def _obstacle(config: BaseConfig, world: World, model: nn.Module) -> str:
    """Returns why the steps of a run cannot be captured, as a part of a sentence; '' if they can."""
    if config.model.grad_checkpointing:
        return "gradient checkpointing saves and restores the state of random numbers, which a graph cannot"
    if world.size > 1 and config.train.accum_steps > 1:
        return "several processes exchange gradients in the last of several accumulation steps alone"
    if any(map(has_hooks, model.modules())):
        return "a layer has hooks, which a graph does not call"
    return ""
