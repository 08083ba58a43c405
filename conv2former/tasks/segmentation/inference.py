"""How an image is answered: whole or in windows, mirrored too or not, at the size that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["Answerer", "windows"]

Answer = Callable[[torch.Tensor], torch.Tensor]


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


def _log_shares(views: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Returns the log of the mean probabilities, (classes, H, W), of views of logits, each (1, classes, h, w)."""
    enlarged = [
        view.float() if tuple(view.shape[2:]) == size
        else F.interpolate(view.float(), size=size, mode="bilinear", align_corners=False)
        for view in views
    ]  # fmt: skip
    if len(enlarged) == 1:
        return enlarged[0].log_softmax(1)[0]
    return torch.stack([view.softmax(1) for view in enlarged]).mean(0).clamp(min=1e-30).log()[0]
