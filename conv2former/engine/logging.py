"""What a run tells: a bar or plain lines, `metrics.jsonl`, TensorBoard, `curves.png`. On the main process only."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

__all__ = ["RunLog", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`, without a last line that was cut off."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class RunLog:
    """Writes down a run.

    Args:
        folder: the run folder.
        total_steps: of the whole run.
        first_step: steps done before; later rows of an earlier attempt are removed.
        tensorboard: whether to write TensorBoard files into `folder/tensorboard`.
        is_main: whether this process writes at all.
    """

    def __init__(self, folder: Path, total_steps: int, first_step: int, tensorboard: bool, is_main: bool) -> None:
        self.folder, self.total_steps, self.is_main = folder, total_steps, is_main
        self.path = folder / "metrics.jsonl"
        self._start, self._first_step = time.perf_counter(), first_step
        self._writer: Any = None
        self._bar: Any = None
        if not is_main:
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= first_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self.path)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        elif self.is_main:
            print(text, flush=True)

    def advance(self) -> None:
        """Moves the bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def step(self, step: int, epoch: int, row: dict[str, float]) -> None:
        """Writes a training row: loss, lr, grad_norm, images_per_second, ..."""
        self._write(step, {"kind": "train", "epoch": epoch, **row}, "train")
        text = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} images/s"
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch}", refresh=False)
            self._bar.set_postfix_str(text)
        elif self.is_main:
            left = (time.perf_counter() - self._start) / (step - self._first_step) * (self.total_steps - step)
            print(f"epoch {epoch}  step {step}/{self.total_steps}  {text}  {_clock(left)} left", flush=True)

    def evaluation(self, step: int, epoch: int, row: dict[str, float]) -> None:
        """Writes an evaluation row: top1, top5, loss, n, and the same of the average as ema_top1, ..."""
        self._write(step, {"kind": "eval", "epoch": epoch, **row}, "eval")

    def images(self, images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Writes up to 32 normalised training images, (N, 3, H, W), as a grid, to `first_batch.png` and TensorBoard."""
        if not self.is_main:
            return
        from torchvision.utils import make_grid, save_image

        shown = images[:32].detach().float().cpu()
        shown = shown * torch.tensor(std).view(1, 3, 1, 1) + torch.tensor(mean).view(1, 3, 1, 1)
        grid = make_grid(shown.clamp(0, 1), nrow=8)
        save_image(grid, self.folder / "first_batch.png")
        if self._writer:
            self._writer.add_image("train/first_batch", grid, self._first_step)

    def close(self) -> None:
        """Ends the bar and flushes TensorBoard."""
        if self._bar is not None:
            self._bar.close()
        if self._writer:
            self._writer.close()

    def plot(self) -> Path:
        """Draws `curves.png`, loss and accuracy over the epochs, from `metrics.jsonl`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = read_metrics(self.path)
        evals = [row for row in rows if row["kind"] == "eval"]
        steps_per_epoch = max((row["step"] / row["epoch"] for row in evals), default=1)
        figure = Figure(figsize=(11, 4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        train = [row for row in rows if row["kind"] == "train"]
        left.plot([r["step"] / steps_per_epoch for r in train], [r["loss"] for r in train], lw=1, label="training")
        left.plot([r["epoch"] for r in evals], [r["loss"] for r in evals], marker=".", label="validation")
        left.set(xlabel="epoch", ylabel="loss", title="Loss (training: of one step, on augmented images)")
        for key, label in (("top1", "top-1"), ("ema_top1", "top-1, averaged weights")):
            points = [(r["epoch"], r[key]) for r in evals if key in r]
            if points:
                right.plot(*zip(*points, strict=True), marker=".", label=label)
        right.set(xlabel="epoch", ylabel="%", title="Validation accuracy")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend()
        path = self.folder / "curves.png"
        figure.savefig(path, dpi=110)
        return path

    def _write(self, step: int, row: dict[str, Any], group: str) -> None:
        if not self.is_main:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        if self._writer:
            for key, value in row.items():
                if key not in ("kind", "n"):
                    self._writer.add_scalar(f"{group}/{key}", value, step)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
