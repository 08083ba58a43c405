"""TensorBoard's files: an extra, so a run that cannot write them goes on without."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes a run's numbers and pictures for TensorBoard, as long as that can be done.

    Its package writes in a thread of its own. What goes wrong there it prints as a traceback, and raises at the next
    call. Here it is one warning, and nothing is written any more.

    Args:
        folder: for the files.
        first_step: steps done before; TensorBoard forgets later ones of an earlier attempt.
        warn: called with one line, once at most.
    """

    def __init__(self, folder: Path, first_step: int, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._writer: Any = None
        self._end: Any = None
        self._hook = threading.excepthook
        threading.excepthook = self._on_error
        self._try(lambda: self._open(first_step))

    def settings(self, values: Mapping[str, str | int | float], metrics: Sequence[str]) -> None:
        """Writes what the tab HParams compares runs by.

        Args:
            values: the settings of this run.
            metrics: names of the numbers that count.
        """
        self._do(lambda: self._write_settings(dict(values), dict.fromkeys(metrics, 0.0)))

    def _write_settings(self, values: dict[str, str | int | float], metrics: dict[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        # not add_hparams, which makes a run of its own of them
        experiment, start, self._end = hparams(values, metrics)
        for summary in (experiment, start):
            self._writer.file_writer.add_summary(summary)

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(self._folder), purge_step=first_step + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by their names."""
        for name, value in values.items():
            self._do(partial(self._add, name, value, step))

    def _add(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, (height, width, 3) 8-bit."""
        self._do(lambda: self._writer.add_image(name, pixels, step, dataformats="HWC"))

    def close(self, is_done: bool = False) -> None:
        """Writes what is still waiting, and ends the thread; `is_done` is whether the run has come to its own end."""
        if is_done and self._end is not None:
            self._do(lambda: self._writer.file_writer.add_summary(self._end))
        self._do(lambda: self._writer.close())
        self._writer = None
        threading.excepthook = self._hook

    def _do(self, action: Callable[[], None]) -> None:
        if self._writer is not None:
            self._try(action)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, ValueError) as e:  # a ValueError where a file that could not be written is closed by now
            self._writer = None
            self._warn(f"warning: {self._folder} cannot be written ({e}); the run goes on without TensorBoard")

    def _on_error(self, error: threading.ExceptHookArgs) -> None:
        if error.thread is None or not type(error.thread).__module__.startswith("tensorboard."):
            self._hook(error)
