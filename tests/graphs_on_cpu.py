"""A recorder of functions on a CPU, which does with them what a CUDA graph would do, as far as Python can see it.

At a capture nothing is computed: results and gradients are tensors full of NaN, and buffers and random states are as
before. A replay computes the function again from the tensors that it was captured with, and puts what comes out into
the tensors that it returned then.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from conv2former import graphs
from conv2former.graphs import Recording


def capture_with(monkeypatch: pytest.MonkeyPatch, make: Callable[[], CpuRecorder]) -> None:
    """Lets a CPU pass for a device on which functions can be captured."""
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(graphs, "recorder_for", lambda device: make())


class CpuRecorder:
    """See `conv2former.graphs.Recorder`.

    Attributes:
        events: what was done, in order: warm-up, capture, replay, reset, close.
        fails: raised by the next captures, after the function has run.
        is_short: what is said of the memory.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self.events: list[str] = []
        self.fails: Exception | None = None
        self.broken = ""
        self.is_short = False

    def warm_up(self, function):
        self.events.append("warm-up")
        return function()

    def capture(self, function) -> Recording:
        self.events.append("capture")
        parameters, buffers = self._parameters(), [] if self.model is None else list(self.model.buffers())
        state, before = torch.get_rng_state(), [buffer.clone() for buffer in buffers]
        result = function()
        torch.set_rng_state(state)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        if self.fails:
            raise self.fails
        gradients = [parameter.grad for parameter in parameters]
        for tensor in [*tensors(result), *(g for g in gradients if g is not None)]:
            tensor.fill_(torch.nan)
        return Recording(result, lambda: self._replay(function, result, gradients), lambda: self.events.append("reset"))

    def _parameters(self) -> list[nn.Parameter]:
        return [] if self.model is None else [p for p in self.model.parameters() if p.requires_grad]

    def _replay(self, function, result, gradients) -> None:
        self.events.append("replay")
        parameters = self._parameters()
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        new = function()
        for kept, parameter in zip(gradients, parameters, strict=True):
            assert (kept is None) == (parameter.grad is None)
            if kept is not None:
                kept.copy_(parameter.grad)
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        for kept, tensor in zip(tensors(result), tensors(new), strict=True):
            kept.copy_(tensor)

    def is_short_of_memory(self) -> bool:
        return self.is_short

    def close(self) -> None:
        self.events.append("close")


def tensors(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for item in result for tensor in tensors(item)]
