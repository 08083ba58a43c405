"""Inference of small batches, where starting a network's kernels from Python takes longer than a GPU needs for them."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import graphs
from .errors import first_line
from .graphs import Graph, Layout, Places, Recorder, copied, layout_of

__all__ = ["Captured", "capture"]

_logger = logging.getLogger(__name__)

WARM_UP = 2  # plain calls before a capture: the first compiles kernels, and both may be of use
SHAPES = 4  # of images that are captured; others are computed plainly


class Captured:
    """A network in evaluation mode that is captured as a CUDA graph, for each shape of images that comes often.

    The first two calls of a shape are plain ones; with the third it is captured. Weights that change in place are
    followed; where parameters are replaced (`.to()`, `load_state_dict(assign=True)`) it begins anew. Hooks on modules
    are called at plain calls and captures alone. Calls from several threads wait for each other; their CUDA stream must
    be the same, as it is by default. What is not on a GPU, is in training mode, or cannot be captured is a plain call.

    Args:
        model: of one tensor, to a tensor or to a list or tuple of them.
        context: makes the context in which the network runs, such as autocast.
        enabled: False for plain calls alone.
    """

    def __init__(self, model: nn.Module, context: Callable[[], AbstractContextManager], enabled: bool = True) -> None:
        self.model, self._context, self._enabled = model, context, enabled
        self._lock = threading.Lock()
        self._recorder: Recorder | None = None
        self._places: Places | None = None
        self._graphs: dict[Layout, Graph] = {}
        self._calls: Counter[Layout] = Counter()

    @torch.inference_mode()
    def __call__(self, images: Tensor, copy: bool = True) -> Any:
        """Returns what the network does, computed in inference mode.

        Args:
            images: (N, C, H, W), on the network's device.
            copy: False for a result that the next call may overwrite, which saves a kernel.
        """
        if not self._enabled or self.model.training or not graphs.can_capture(images.device):
            return self._forward(images)
        with self._lock:
            return self._run(images, copy)

    def _forward(self, images: Tensor) -> Any:
        with self._context():
            return self.model(images)

    def _run(self, images: Tensor, copy: bool) -> Any:
        if self._places is not None and not self._places.hold():
            self.reset()
        self._recorder = self._recorder or graphs.recorder_for(images.device)
        if not self._enabled or self._recorder is None or self._recorder.broken:
            return self._forward(images)
        layout = layout_of(images)
        graph = self._graphs.get(layout)
        if graph is None and len(self._graphs) < SHAPES:
            self._calls[layout] += 1
            if self._calls[layout] <= WARM_UP:
                return self._recorder.warm_up(partial(self._forward, images))
            graph = self._capture(self._recorder, layout, images)
        if graph is None:
            return self._forward(images)
        result = graph(images)
        return copied(result) if copy else result

    def _capture(self, recorder: Recorder, layout: Layout, images: Tensor) -> Graph | None:
        """Returns a new graph; None where it cannot be made, and then none is tried again."""
        try:
            self._graphs[layout] = Graph(recorder, self._forward, images)
            self._places = self._places or Places(self.model)
            return self._graphs[layout]
        except Exception as error:  # a mistake in the network is told by the plain call
            reason = first_line(error)
        self._enabled = False
        self.reset()  # not above, where the error's traceback holds the memory that this gives back
        _logger.warning("no CUDA graph: %s; the network is called plainly, with the same results", reason)
        return None

    def reset(self) -> None:
        """Gives up all graphs and their memory; later calls begin anew."""
        for graph in self._graphs.values():
            graph.reset()
        if self._recorder is not None:
            self._recorder.close()
        self._graphs, self._calls = {}, Counter()
        self._recorder = self._places = None

    def __enter__(self) -> Captured:
        return self

    def __exit__(self, *exception: object) -> None:
        self.reset()


def capture(model: nn.Module, example: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Captured:
    """Returns a network for serving, which on a GPU answers through a CUDA graph and anywhere else plainly.

        model, _ = conv2former.load_model("best.pt")
        images = torch.zeros(1, 3, 224, 224, device="cuda")
        serve = conv2former.capture(model.cuda(), images, dtype=torch.bfloat16)
        logits = serve(images)  # (1, classes), as model(images) in inference mode under autocast

    Images of other shapes are answered, too, and captured when they have come three times, up to four shapes; see
    `Captured`.

    Args:
        model: in evaluation mode, from (N, C, H, W) images to a tensor, or to a list or tuple of tensors.
        example: images (N, C, H, W) on the network's device, for which it is captured at once; None to begin later.
        dtype: of autocast, such as torch.bfloat16; None for the types of the weights. An autocast around the calls has
            no effect.

    Raises:
        ValueError: the network is in training mode.
    """
    if model.training:
        raise ValueError("capture: the network is in training mode; call model.eval() first")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    # no cache: what an autocast around the call has kept of the weights would be gone when the graph reads it
    context = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
    serve = Captured(model, context)
    if example is not None:
        for _ in range(WARM_UP + 1):
            serve(example)
    return serve
