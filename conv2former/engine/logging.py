"""What a run tells: a bar or plain lines, `train.log`, `metrics.jsonl`, TensorBoard. On the main process only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import OutputError
from ..tasks.registry import is_result
from ..text import printable
from .fonts import drawing
from .tensorboard import TensorBoard
from .terminal import Bar, PlainProgress, bar_size, clock, say
from .trackers import Trackers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RunLog", "read_metrics", "writing"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`, without lines that were cut off or that no run has written."""
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if _is_row(row):
                rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Returns whether a row has what the log of a run, and its curves, take from it."""
    if not isinstance(row, dict) or row.get("kind") not in ("train", "eval"):
        return False
    numbers = [value for key, value in row.items() if key != "kind"]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        return False
    counts = (row.get("step"), row.get("epoch", 1))
    is_whole = "loss" in row if row["kind"] == "train" else "epoch" in row and is_result(row)
    if not is_whole or not all(type(count) is int and 0 <= count < 2**53 for count in counts):
        return False
    return min(counts) > 0 or (row["kind"] == "eval" and max(counts) == 0)  # a linear probe, before the first step


class RunLog:
    """Writes down a run.

    Args:
        folder: the run folder.
        total_steps: of the whole run.
        first_step: steps done before; later rows of an earlier attempt are removed.
        tensorboard: whether to write TensorBoard files into `folder/tensorboard`.
        is_main: whether this process writes at all.
        must_evaluate: whether the evaluation after `first_step` is still to come, so that its row, if any, goes too.
        hidden: keys of rows that TensorBoard does not get.
        best: keys of metrics of which it gets the best weights' so far, by which runs are compared.

    Every method raises OutputError if the folder cannot be written, but for TensorBoard's files, of which a line warns.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        first_step: int,
        tensorboard: bool,
        is_main: bool,
        must_evaluate: bool = False,
        hidden: Sequence[str] = (),
        best: Iterable[str] = (),
    ) -> None:
        self._hidden, self._best = {"kind", "n", *hidden}, tuple(best)
        self.folder, self.total_steps, self.is_main = folder, total_steps, is_main
        self.path = folder / "metrics.jsonl"
        self._start, self._first_step = time.perf_counter(), first_step
        self._tensorboard: TensorBoard | None = None
        self._trackers: Trackers | None = None
        self._bar: Any = None
        if not is_main:
            return
        with writing(folder):
            kept = [row for row in read_metrics(self.path) if row["step"] <= first_step]
            if must_evaluate:
                kept = [row for row in kept if (row["step"], row["kind"]) != (first_step, "eval")]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(temporary, self.path)
        self._plain = PlainProgress("training", " steps", total_steps, first_step)
        if sys.stderr.isatty():
            self._bar = Bar(total=total_steps, initial=first_step, unit="step", smoothing=0.05, **bar_size())
        if tensorboard:
            self._tensorboard = TensorBoard(folder / "tensorboard", first_step, self.say)

    def begin(self, config: Mapping[str, Any], trackers: Sequence[str], project: str | None) -> None:
        """Tells TensorBoard the configuration, and trackers, which begin with it: their threads start here.

        Args:
            config: the run, as plain types.
            trackers, project: `log.trackers` and `log.project`.
        """
        if not self.is_main:
            return
        settings = dict(_flat(config))
        if self._tensorboard:
            texts = {key: value if _is_number(value) else _text(value) for key, value in settings.items()}
            names = [f"best/{key}" for key in ("epoch", *self._best)]
            self._tensorboard.settings(texts, names)
        if trackers:
            self._trackers = Trackers(trackers, self.folder, project, settings, self.say)

    def start_clock(self) -> None:
        """Counts the time of the steps from here on, of which the time that is left follows."""
        self._start = time.perf_counter()
        if self.is_main:
            self._plain.start_clock()
            if self._bar is not None:
                self._bar.unpause()

    def say(self, *lines: str) -> None:
        """Prints lines, above the bar if there is one, and writes each to `train.log` with the time; see `say`."""
        if not self.is_main:
            return
        say(*lines)
        self._plain.rest()
        self._log(*lines)

    def advance(self) -> None:
        """Moves the bar by one step; without a bar, says now and then how far the run is."""
        if not self.is_main:
            return
        (self._plain if self._bar is None else self._bar).update()

    def step(self, step: int, epoch: int, row: dict[str, float]) -> None:
        """Writes a training row: loss, lr, grad_norm, images_per_second, data_wait, memory_gib."""
        self._write(step, {"kind": "train", "epoch": epoch, **row}, "train")
        if not self.is_main:
            return
        text = (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} images/s  "
            f"data wait {row['data_wait']:.0%}"
        )
        left = (time.perf_counter() - self._start) / (step - self._first_step) * (self.total_steps - step)
        line = f"epoch {epoch}  step {step}/{self.total_steps}  {text}  {clock(left)} left"
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch}", refresh=False)
            self._bar.set_postfix_str(text)
        else:
            say(line)
            self._plain.rest()
        self._log(line)

    def evaluation(self, step: int, epoch: int, row: dict[str, float], best_prefix: str | None = None) -> None:
        """Writes an evaluation row: the metrics, and the same of the average as ema_top1, ...

        Args:
            step, epoch: done.
            row: the metrics.
            best_prefix: what the keys of the metrics begin with that are the best so far; None where none are.
        """
        self._write(step, {"kind": "eval", "epoch": epoch, **row}, "eval")
        if self.is_main and best_prefix is not None:
            best = {f"best/{key}": row[f"{best_prefix}{key}"] for key in self._best}
            self._send(step, {"best/epoch": epoch, **best})

    def picture(self, name: str, figure: Figure, step: int, in_tensorboard: bool = True) -> Path:
        """Writes a picture to `NAME.png`, whole or not at all, and to TensorBoard."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.image import imsave

        canvas = FigureCanvasAgg(figure)
        with drawing(figure):
            canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())
        path = self.folder / f"{name}.png"
        with writing(self.folder):
            temporary = path.with_name(f".{path.name}")
            imsave(temporary, pixels, format="png")
            os.replace(temporary, path)
        if self._tensorboard and in_tensorboard:
            self._tensorboard.picture(step, name, pixels[..., :3])
        if self._trackers and in_tensorboard:
            self._trackers.picture(step, name, path)
        return path

    def close(self, is_done: bool = False) -> None:
        """Ends the bar, TensorBoard and the trackers; `is_done` is whether the run has come to its own end."""
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard:
            self._tensorboard.close(is_done)
        if self._trackers:
            self._trackers.close(is_done)

    def _log(self, *lines: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with writing(self.folder), (self.folder / "train.log").open("a", encoding="utf-8") as file:
            file.writelines(f"{now}  {printable(line)}\n" for line in lines)

    def _write(self, step: int, row: dict[str, Any], group: str) -> None:
        if not self.is_main:
            return
        with writing(self.folder), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        shown = {_tag(group, key): value for key, value in row.items() if key not in self._hidden}
        self._send(step, shown)

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._tensorboard:
            self._tensorboard.numbers(step, numbers)
        if self._trackers:
            self._trackers.numbers(step, numbers)


def _tag(group: str, key: str) -> str:
    """Returns the name of a number: `eval/top1`, and apart from these, one for each class, `recall/cat`."""
    return printable(key) if "/" in key else f"{group}/{key}"


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and values of nested settings."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what goes wrong while writing into the run folder into an error that says so.

    Raises:
        OutputError: the disk is full, the folder has gone, ...
    """
    try:
        yield
    except OSError as e:
        raise OutputError(
            f"{folder} cannot be written ({e}). Make room or repair the disk; the same command goes on from the last "
            "checkpoint"
        ) from None
