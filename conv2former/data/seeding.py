"""Random numbers as a function of the place in a run at which they are drawn."""

from __future__ import annotations

import enum
import random

import numpy as np
import torch

__all__ = ["Stream", "seed_all"]


class Stream(enum.IntEnum):
    """What a random number is for, so that equal places in different streams draw different numbers."""

    INIT = 0
    IMAGE = 1
    STEP = 2
    ORDER = 3
    SIDE = 4


def seed_all(stream: Stream, *place: int) -> None:
    """Seeds Python, NumPy and torch, on the CPU and the current GPU, from a place in the run: (seed, epoch, index)."""
    words = np.random.SeedSequence([stream, *map(int, place)]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - timm's augmentation draws from the global generator
    # not torch.manual_seed, which takes a stack trace for every kind of device that there might be
    seed = int(words[2]) << 31 ^ int(words[3])
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
