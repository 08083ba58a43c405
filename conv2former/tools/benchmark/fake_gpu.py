"""A GPU that is not there: networks whose weights have no memory, autocast, and a backward pass, to count what is run.

Everything goes through the same Python and the same operators as on a GPU. Only the engine of autograd, which asks CUDA
for its devices, is replaced by a walk through the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ... import _private
from .networks import with_tensors

__all__ = ["autocast", "backward", "on_fake_gpu"]

DEVICE = torch.device("cuda", 0)


def on_fake_gpu(model: nn.Module) -> nn.Module:
    """Returns a copy of a network with weights on a GPU; to be called inside of `_private.fake_gpu()`."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

    return with_tensors(model, fake)


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """What `torch.autocast("cuda", dtype)` is where CUDA is: without it, torch switches autocast off with a warning."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    torch.autocast_increment_nesting()  # else what is inside, and has an end, would clear the cache of cast weights
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def backward(loss: Tensor) -> None:
    """Computes the gradients of all parameters as `loss.backward()` does, node by node; no hooks are called.

    Args:
        loss: one number, with a graph.
    """
    root = loss.grad_fn
    waiting = _edges_into(root)
    grads: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready: list[Any] = [root]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            for (target, place), grad in _run(node, grads.pop(node, {})):
                if grad is not None:
                    _add(grads.setdefault(target, {}), place, _as_expected(target, place, grad))
                waiting[target] -= 1
                if not waiting[target]:
                    ready.append(target)


def _edges_into(root: Any) -> dict[Any, int]:
    """Returns how many edges of the graph lead to each node, those of several outputs each counted."""
    edges: dict[Any, int] = defaultdict(int)
    seen, todo = {root}, [root]
    while todo:
        for target, _ in todo.pop().next_functions:
            if target is not None:
                edges[target] += 1
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
    return edges


def _run(node: Any, grads: dict[int, Tensor]) -> list[tuple[tuple[Any, int], Tensor | None]]:
    """Runs a node of the graph; returns where its results go, and these."""
    if hasattr(node, "variable"):  # a parameter
        if grads:
            _accumulate(node.variable, grads[0])
        return []
    given = [grads.get(place) for place in range(1 + max(grads, default=0))]
    is_ours = hasattr(node, "apply")  # a torch.autograd.Function of Python
    out = (node.apply if is_ours else node)(*given)
    results = list(out) if isinstance(out, tuple) else [out]
    targets = list(node.next_functions)
    if is_ours:  # it returns something for arguments that are no tensors, too, which have no edge
        results = [grad for grad, needed in zip(results, node.needs_input_grad, strict=True) if needed]
        targets = [target for target in targets if target[0] is not None]
    pairs = zip(targets, results, strict=True)
    return [(target, grad) for target, grad in pairs if target[0] is not None]


def _add(grads: dict[int, Tensor], place: int, grad: Tensor) -> None:
    grads[place] = grads[place] + grad if place in grads else grad


def _as_expected(node: Any, place: int, grad: Tensor) -> Tensor:
    """Returns a gradient in the shape and the type that a node takes, as the engine makes it."""
    shape, dtype = _private.expected_gradient(node, place)
    if grad.shape != shape:
        grad = grad.sum_to_size(shape)
    return grad.to(dtype)


def _accumulate(parameter: Tensor, grad: Tensor) -> None:
    """Keeps a gradient as it is if it lies in memory as its parameter does; else it is copied."""
    if parameter.grad is not None:
        parameter.grad += grad
        return
    strides = zip(grad.stride(), parameter.stride(), parameter.shape, strict=True)
    if all(own == wanted for own, wanted, size in strides if size != 1):
        parameter.grad = grad.detach()
    else:
        parameter.grad = torch.empty_like(parameter).copy_(grad)
