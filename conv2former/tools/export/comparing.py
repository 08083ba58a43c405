"""The file's answers beside the network's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ...errors import CheckpointError, OutputError, counted, first_line
from ...models import CheckpointInfo, Preprocessing
from ...weights.description import OtherInfo
from .opening import Run
from .options import Options
from .subject import Case

__all__ = ["compare", "shapes_of"]


def shapes_of(info: CheckpointInfo, preprocessing: Preprocessing, options: Options) -> list[tuple[int, ...]]:
    """Returns the input shapes that a file is tried with.

    A dynamic file is tried with two batch sizes, of a Conv2Former each with the input size and two others that are
    neither square nor multiples of 32; another with its one shape, twice.
    """
    height, width = preprocessing.size
    if not options.dynamic:
        return [(options.batch_size, info.in_chans, height, width)] * 2
    if isinstance(info, OtherInfo):
        return [(batch, info.in_chans, height, width) for batch in (1, 3)]
    sizes = ((height, width), (height + 26, max(width - 34, 33)), (max(height // 2, 32) + 1, width + 7))
    return [(batch, info.in_chans, *size) for size in sizes for batch in (1, 3)]


def compare(model: nn.Module, run: Run, shapes: Sequence[tuple[int, ...]], say: Callable[[str], None]) -> list[Case]:
    """Runs the network and a file of it on the same noise.

    Raises:
        CheckpointError: the network's own answers are not finite numbers.
        OutputError: the file does not run.
    """
    rng = np.random.default_rng(0)
    cases = []
    for i, shape in enumerate(shapes):
        say(f"comparing, {i + 1} of {counted(len(shapes), 'batch', 'batches')}")
        images = rng.standard_normal(shape, dtype=np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(images)).numpy()
        if not np.isfinite(expected).all():
            raise CheckpointError("the network's answers to noise are not all finite numbers; its weights are broken")
        try:
            found = run(images)
        except Exception as e:  # the runtimes' errors have no common class
            size = " x ".join(map(str, shape))
            raise OutputError(f"the file does not run on an input of {size} ({first_line(e)})") from None
        if found.shape != expected.shape:
            raise OutputError(f"the file's answer has the shape {found.shape}, the network's {expected.shape}")
        same = float((found.argmax(1) == expected.argmax(1)).mean()) if expected.ndim == 4 else None
        cases.append(Case(shape, float(np.abs(expected).max()), float(np.abs(found - expected).max()), same))
    return cases
