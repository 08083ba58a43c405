"""Memory of one step of a network, in bytes, counted from the allocations that the profiler (on CUDA: torch) records.

Such counts do not depend on the machine's speed, its load or its number of threads, and they see what a checkpointed
region or an autograd function keeps, whatever way it keeps it.

    images = torch.randn(2, 3, 224, 224)
    bytes_held(timm.create_model("conv2former_t"), images, torch.bfloat16) / len(images) / 1e6  # MB per image
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["bytes_held", "peak_bytes"]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its own start, stop and want of a GPU


def bytes_held(model: nn.Module, images: Tensor, autocast_dtype: torch.dtype | None = None) -> int:
    """Counts what a training step keeps between its forward and its backward pass.

    That is: bytes allocated between the start and the end of the forward pass, less those freed between them, in
    training mode, with the output and so the graph alive. What was there before does not count: parameters, buffers,
    gradients, state of the optimizer. A loss is not computed; a cross-entropy would add its log-probabilities, 4 bytes
    per image and class.

    The batch is copied inside what is measured and then belongs to the forward pass alone, so it counts as long as the
    graph keeps it: in fp32 a first convolution needs it for the gradient of its weights, under autocast it needs the
    cast copy only. Autocast's copies of the weights do count, once per batch: 2 bytes per parameter that is cast, so
    that bytes per image depend on the batch size there. Two images, whose share of them is large, are the convention of
    this project's figures.

    Args:
        model: any network of one input; it runs twice, so that caches are filled before the count. Its mode and
            gradients stay as they are; its statistics (BatchNorm) move as in any training step.
        images: (N, 3, H, W), on the model's device, in the memory format that the user gives.
        autocast_dtype: of autocast, or None for none.

    Returns:
        Bytes for the whole batch. On CUDA in the allocator's blocks of 512 bytes.
    """

    def forward() -> Tensor:
        with torch.autocast(images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            return model(images.clone())

    was_training = model.training
    model.train()
    try:
        with torch.enable_grad(), _no_collection():
            forward()
            return _bytes_kept(forward, images.device)
    finally:
        model.train(was_training)


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Counts the most bytes that an action has allocated at one time, over what was allocated when it began.

    Args:
        action: what to run, once; it should have run before, so that caches are filled.
        device: whose memory.
    """
    with _no_collection():
        if device.type != "cuda":
            return max(accumulate(_memory_records(action), initial=0))
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before


def _bytes_kept(action: Callable[[], object], device: torch.device) -> int:
    """Returns the bytes that an action has allocated and not released while its result is alive."""
    if device.type != "cuda":
        return sum(_memory_records(action))
    before = torch.cuda.memory_allocated(device)
    kept = action()
    after = torch.cuda.memory_allocated(device)
    del kept
    return after - before


def _memory_records(action: Callable[[], object]) -> list[int]:
    """Returns the bytes of each allocation (positive) and release (negative) of main memory, in the order of time.

    What `action` returns is kept until recording has ended.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = action()
    del kept
    # The public events() adds the records up per operator, which hides a peak inside one.
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    records = [e for e in events if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    return [e.nbytes() for e in sorted(records, key=lambda e: e.start_ns())]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector from releasing earlier tensors while something is counted."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
