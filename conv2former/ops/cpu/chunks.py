"""Cuts a batch into a few images at a time, so that what one operation writes is still in the cache for the next."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["images_at_a_time", "in_chunks"]

# Hidden values that go through a branch together: some MB for each thread that there is at the import, the size of a
# cache.
CHUNK = 2**20 * torch.get_num_threads()


def images_at_a_time(x: Tensor, hidden: int) -> int:
    """Returns how many images (N, H, W, C) go through a branch together whose inner maps have `hidden` channels."""
    _, h, w, _ = x.shape
    return max(1, CHUNK // max(1, h * w * hidden))


def in_chunks(images: int, x: Tensor, *others: Tensor | None) -> list[tuple]:
    """Returns so many images of each tensor at a time; None of those that are None."""
    if x.shape[0] <= images:
        return [(x, *others)]
    chunks = x.split(images)
    return list(zip(chunks, *(itertools.repeat(None) if t is None else t.split(images) for t in others), strict=False))
