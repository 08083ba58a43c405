"""How an image is answered: whole or in windows, mirrored too or not, at the size that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["Answerer", "windows"]

Answer = Callable[[torch.Tensor], torch.Tensor]
AT_ONCE = 1 << 27  # numbers, half a gigabyte, of enlarged logits


def windows(length: int, window: int, overlap: float) -> list[int]:
    """Returns where windows begin along a side: evenly spread, so that each shares at least `overlap` with the next."""
    if length <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // step) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class Answerer:
    """Gives a network's answers to whole images.

    Attributes:
        window: height and width, pixels; None for whole images.
        overlap: of a window with the next, a share of it.
        flip: whether the mirrored image is answered, too.
    """

    window: tuple[int, int] | None
    overlap: float
    flip: bool

    def __call__(self, answer: Answer, images: torch.Tensor, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        """Returns log-probabilities of each image, (classes, height, width), float32.

        Logits are averaged over the windows, enlarged, and their probabilities are averaged over the mirrored views.

        Args:
            answer: the network: images to logits of their size.
            images: (N, channels, H, W), normalised.
            sizes: height and width of each result.
        """
        views = [self._logits(answer, images)]
        if self.flip:
            views.append(self._logits(answer, images.flip(3)).flip(3))
        return [_log_shares([view[i : i + 1] for view in views], size) for i, size in enumerate(sizes)]

    def classes(self, answer: Answer, images: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Returns the most probable class of every pixel, (height, width) int64; the arguments are those of a call.

        Without mirrored views a few classes at a time are enlarged, so large photos and many classes fit in memory.

        Raises:
            ValueError: an answer is not a finite number.
        """
        if self.flip:
            shares = self(answer, images, list(sizes))
            if not all(share.isfinite().all() for share in shares):
                raise ValueError("not all answers are finite numbers")
            return [share.argmax(0) for share in shares]
        logits = self._logits(answer, images).float()
        if not logits.isfinite().all():
            raise ValueError("not all answers are finite numbers")
        return [_highest(logits[i : i + 1], size) for i, size in enumerate(sizes)]

    def _logits(self, answer: Answer, images: torch.Tensor) -> torch.Tensor:
        if self.window is None:
            return answer(images)
        height, width = images.shape[2:]
        rows, columns = (min(side, length) for side, length in zip(self.window, (height, width), strict=True))
        total: torch.Tensor | None = None
        times = images.new_zeros((1, 1, height, width))
        for top in windows(height, rows, self.overlap):
            for left in windows(width, columns, self.overlap):
                place = (..., slice(top, top + rows), slice(left, left + columns))
                logits = answer(images[place].contiguous())
                total = logits.new_zeros((*logits.shape[:2], height, width)) if total is None else total
                total[place] += logits
                times[place] += 1
        assert total is not None
        return total / times


def _highest(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns the class of the highest of logits, (1, classes, h, w), at a size, (H, W)."""
    some = max(1, AT_ONCE // (size[0] * size[1]))
    best: torch.Tensor | None = None
    found = logits.new_zeros(size, dtype=torch.int64)
    for first in range(0, logits.shape[1], some):
        values, classes = _enlarged(logits[:, first : first + some], size)[0].max(0)
        if best is None:
            best, found = values, classes
        else:
            found = torch.where(values > best, classes + first, found)
            best = torch.maximum(values, best)
    return found


def _enlarged(view: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns what a view of an image, (1, classes, h, w), is at a size, float32."""
    if tuple(view.shape[2:]) == size:
        return view.float()
    return F.interpolate(view.float(), size=size, mode="bilinear", align_corners=False)


def _log_shares(views: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Returns the log of the mean probabilities, (classes, H, W), of views of logits, each (1, classes, h, w)."""
    enlarged = [_enlarged(view, size) for view in views]
    if len(enlarged) == 1:
        return enlarged[0].log_softmax(1)[0]
    return torch.stack([view.softmax(1) for view in enlarged]).mean(0).clamp(min=1e-30).log()[0]
