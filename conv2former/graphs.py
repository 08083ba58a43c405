"""CUDA graphs: what a GPU does for a function is written down once, and repeated without Python.

A graph repeats kernels on the same memory. So its inputs are copied into tensors that stay, its results are the same
tensors every time, and everything else that the function reads, such as weights, must stay where it was. What Python
does, in the function or in hooks, happens at the capture alone.

All that is CUDA's is in `CudaRecorder`; tests/graphs_on_cpu.py has one that repeats functions on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .errors import first_line

__all__ = [
    "CudaRecorder",
    "Graph",
    "Layout",
    "Places",
    "Recorder",
    "Recording",
    "can_capture",
    "copied",
    "layout_of",
    "recorder_for",
]

T = TypeVar("T")
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class Recording(NamedTuple):
    """A function that was captured.

    Attributes:
        result: what it returned: the tensors that every replay fills anew.
        replay: repeats it, in the order of the current stream.
        reset: gives up what is kept for it; the last call.
    """

    result: Any
    replay: Callable[[], object]
    reset: Callable[[], object]


class Recorder(Protocol):
    """What captures functions."""

    @property
    def broken(self) -> str:
        """Why nothing can be captured any more, and no recording may be replayed; '' as long as they can."""

    def warm_up(self, function: Callable[[], T]) -> T:
        """Runs a function where it would be captured, in the order of the current stream, and returns its result."""

    def capture(self, function: Callable[[], Any]) -> Recording:
        """Captures a function that has been warmed up. Nothing is computed: no tensor and no random state changes."""

    def is_short_of_memory(self) -> bool:
        """Returns whether less memory is free than is in use."""

    def close(self) -> None:
        """Gives memory back once all recordings are reset. It may capture again."""


class CudaRecorder:
    """Captures what functions do on a GPU, with one memory pool for all of them.

    Warming up and capturing use the same stream, which is not the current one: libraries, such as cuBLAS, keep a
    workspace for each stream, and autograd brings a gradient to the stream on which its node was made. The results of a
    replay are valid until any other recording of the same recorder is replayed, since the recordings share memory.

    Args:
        device: the GPU.
    """

    # For the whole process; the graph that failed is kept, since the allocator goes on to ask it.
    broken: ClassVar[str] = ""
    _failed: ClassVar[list[torch.cuda.CUDAGraph]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], T]) -> T:
        """See `Recorder`."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], Any]) -> Recording:
        """See `Recorder`.

        Raises:
            RuntimeError: something in it cannot be captured. Where CUDA says so, this process captures nothing more.
        """
        if CudaRecorder.broken:
            raise RuntimeError(CudaRecorder.broken)
        graph, random_state = torch.cuda.CUDAGraph(), torch.cuda.get_rng_state(self.device)
        raised: BaseException | None = None
        try:
            # thread_local: the loader's thread pins memory, which other modes forbid to all threads of the process.
            # The outer context puts the current stream back, which torch leaves changed where the capture's end fails.
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = function()
                except BaseException as error:
                    raised = error
                    raise
        except BaseException as error:
            if error is raised:
                raise
            self._break_off(graph, random_state, raised or error)  # the capture itself could not be ended
            raise (raised or error) from None
        finally:
            raised = None  # else its traceback keeps this frame, this frame the error, and both the maps of the network
        return Recording(result, graph.replay, graph.reset)

    def _break_off(self, graph: torch.cuda.CUDAGraph, random_state: Tensor, reason: BaseException) -> None:
        """Makes the process fit to go on without graphs.

        torch's generator believes that it is still captured, and would refuse to draw: it gets another state, with the
        seed and the offset of before. Graphs that exist would draw from the old one.
        """
        CudaRecorder.broken = f"an earlier capture failed: {first_line(reason)}"
        CudaRecorder._failed.append(graph)
        generator = torch.Generator(self.device)
        generator.set_state(random_state)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        torch.cuda.default_generators[index].graphsafe_set_state(generator.graphsafe_get_state())

    def is_short_of_memory(self) -> bool:
        """See `Recorder`."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free < torch.cuda.memory_reserved(self.device)

    def close(self) -> None:
        """See `Recorder`."""
        torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()  # one that no graph uses any more cannot be used again


def can_capture(device: torch.device) -> bool:
    """Returns whether functions can be captured on a device: on NVIDIA's GPUs."""
    return device.type == "cuda" and torch.version.hip is None


def recorder_for(device: torch.device) -> Recorder | None:
    """Returns what captures on a device, None where nothing can."""
    return CudaRecorder(device) if can_capture(device) else None


def layout_of(x: Tensor) -> Layout:
    """Returns what must be the same of an input for a graph to take it: shape, strides, type and device."""
    return x.shape, x.stride(), x.dtype, x.device


class Graph:
    """A captured function of tensors.

    Args:
        recorder: captures it.
        function: of the tensors; it has been warmed up with such.
        inputs: examples, whose values do not matter.
    """

    def __init__(self, recorder: Recorder, function: Callable[..., Any], *inputs: Tensor) -> None:
        self._inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs]
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._recording = recorder.capture(partial(function, *self._inputs))

    def __call__(self, *inputs: Tensor) -> Any:
        """Returns the function's result: the tensors that the next call fills anew.

        Raises:
            ValueError: an input is not like the one that the graph was captured with.
        """
        for i, (kept, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if layout_of(kept) != layout_of(given):
                raise ValueError(f"input {i} of a graph must be {layout_of(kept)}, but is {layout_of(given)}")
            kept.copy_(given, non_blocking=True)
        self._recording.replay()
        return self._recording.result

    def reset(self) -> None:
        """Gives up the graph and its memory; it cannot be called again."""
        self._recording.reset()
        self._recording = Recording(None, _is_gone, lambda: None)
        self._inputs = []


def _is_gone() -> None:
    raise RuntimeError("a graph was called after its reset")


class Places:
    """Where a network's parameters and buffers are: a graph reads them there, whatever the network has since.

    Values that change in place are seen by a graph. `load_state_dict(assign=True)`, `.to()` and new modules are not.

    Args:
        model: the network, whose layers are looked up once, since going over them takes a millisecond.
    """

    def __init__(self, model: nn.Module) -> None:
        self._holders = [
            (holder, name)
            for module in model.modules()
            for holder in (module._parameters, module._buffers, module._modules)
            for name in holder
        ]
        self._found = self._look()

    def _look(self) -> list[Any]:
        things = [holder.get(name) for holder, name in self._holders]
        return [thing.data_ptr() if isinstance(thing, Tensor) else thing for thing in things]

    def hold(self) -> bool:
        """Returns whether all are where they were."""
        return self._look() == self._found


def copied(result: Any) -> Any:
    """Returns copies of a tensor, or of a list or tuple of tensors."""
    if isinstance(result, (list, tuple)):
        return type(result)(copied(item) for item in result)
    return result.clone()
