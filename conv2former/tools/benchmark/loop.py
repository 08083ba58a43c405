"""Speed, measured as ratios: two ways of doing the same, in turns, in one process, medians of many."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from ..._preprocessing import size_text
from ...config import Config, make_plan
from ...data import Batch, DataSource
from ...engine.build import fit_memory_format
from ...engine.distributed import World
from ...engine.prepare import Job
from ...engine.signals import StopSignal
from ...engine.trainer import Trainer
from ...errors import counted
from ...tasks.network import build_model
from .progress import Progress, duration

__all__ = ["Comparison", "compare", "compare_loop"]


@dataclass(frozen=True)
class Comparison:
    """Seconds of two ways of doing the same, one pair per round; fewer rounds than asked for if interrupted."""

    first: list[float]
    second: list[float]
    interrupted: bool = False

    @property
    def ratios(self) -> list[float]:
        """How many times longer the second took, per round."""
        return [b / a for a, b in zip(self.first, self.second, strict=True)]

    def describe(self, first: str, second: str, per: int, unit: str) -> list[str]:
        """Returns lines with both medians, per `unit`, and the median and the middle half of the ratios."""
        low, middle, high = statistics.quantiles(self.ratios, n=4) if len(self.ratios) > 1 else self.ratios * 3
        a, b = (1000 * statistics.median(seconds) / per for seconds in (self.first, self.second))
        ended = ", interrupted" if self.interrupted else ""
        return [
            f"{first}: {a:.2f} ms per {unit}",
            f"{second}: {b:.2f} ms per {unit}",
            f"ratio {middle:.3f} (middle half of {counted(len(self.ratios), 'round')}: {low:.3f} to {high:.3f}{ended})",
        ]


def compare(
    first: Callable[[], None],
    second: Callable[[], None],
    rounds: int,
    device: torch.device,
    progress: Progress | None = None,
    what: str = "timing",
) -> Comparison:
    """Times two functions in turns, each first in every second round, after one round that does not count.

    Ctrl-C ends the comparison; it has the rounds until then.

    Args:
        first, second: what to time.
        rounds: how often.
        device: waited for before the clock is read.
        progress: told, under the name `what`, which round it is and how long the others will take.

    Raises:
        KeyboardInterrupt: there is no round yet.
    """

    def seconds(action: Callable[[], None]) -> float:
        since = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - since

    times: list[tuple[float, float]] = []
    interrupted = False
    try:
        for number in range(rounds + 1):
            if progress is not None:
                _tell(progress, what, number, rounds, times)
            if number % 2:
                b = seconds(second)
                times.append((seconds(first), b))
            else:
                a = seconds(first)
                times.append((a, seconds(second)))
    except KeyboardInterrupt:
        if len(times) < 2:
            raise
        interrupted = True
    return Comparison([a for a, _ in times[1:]], [b for _, b in times[1:]], interrupted)


def _tell(progress: Progress, what: str, number: int, rounds: int, times: list[tuple[float, float]]) -> None:
    """Says which round begins, what the rounds until then say, and how long the others will take."""
    if number == 0:
        progress.at(f"{what}: a first round, which does not count")
        return
    left = (rounds + 1 - number) * statistics.median(a + b for a, b in times)
    if number == 1:
        progress.say(f"{what}: about {duration(left)} for {counted(rounds, 'round')}")
    so_far = f", ratio so far {statistics.median(b / a for a, b in times[1:]):.3f}" if times[1:] else ""
    progress.at(f"{what}: round {number} of {rounds}{so_far}", left)


def compare_loop(config: Config, steps: int, rounds: int, progress: Progress | None = None) -> Iterator[str]:
    """Compares the training loop with a bare one on the same synthetic batches.

    The bare loop does no more than forward, loss, backward and optimizer step, through a CUDA graph where the training
    loop has one. The training loop is the trainer's own,
    with its seeding, gradient norm, checks, agreement on signals and logs, but without loader, averaging and mixup,
    which are work of their own and not the loop's.

    Args:
        config: network, batch size, precision and optimizer; `data.num_classes` must be set.
        steps: of one timing.
        rounds: timings of each.
        progress: told how far it is.

    Yields:
        Lines to print, as they come.

    Raises:
        KeyboardInterrupt: the user has ended it; what was measured until then is yielded before.
    """
    sections = {"ema": {"decay": None}, "augment": {"mixup": 0.0, "cutmix": 0.0}, "train": {"accum_steps": 1}}
    plain = config.to_dict()
    config = Config.model_validate({**plain, **{key: plain[key] | value for key, value in sections.items()}})
    world = World.from_environment()
    batch_size, images, classes = config.train.batch_size, config.data.preprocessing, config.data.num_classes
    assert classes is not None
    size, precision = size_text(images.size), config.train.precision
    yield f"{config.model.name}, batch {batch_size}, {size}, {precision}, {world.device.type}"
    source = DataSource(cast(Any, []), [str(i) for i in range(classes)], "random images")
    plan = make_plan(config, world.size, batch_size * world.size * steps)
    batch = Batch(torch.randn(batch_size, images.channels, *images.size), torch.randint(classes, (batch_size,)), [])
    if world.device.type == "cuda":
        batch = Batch(batch.images.pin_memory(), batch.labels.pin_memory(), [])
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(config, classes)
        config, _ = fit_memory_format(config, model, world.device)
        job = Job(config, Path(folder), plan, source, source, model, None, None, {}, [], None)
        with StopSignal() as signal:
            trainer = Trainer(job, world, signal)
            trainer.loader = DataLoader(cast(Any, [batch] * steps), batch_size=None, collate_fn=lambda batch: batch)
            run = trainer.run
            memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format

            def compute(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                loss = run.objective.loss(run.autocast_forward, images, labels)
                run.scaler.scale(loss).backward()
                return loss.detach()

            def bare() -> None:
                run.model.train()
                for images, labels in [(batch.images, batch.labels)] * steps:
                    images = images.to(world.device, memory_format=memory_format, non_blocking=True)
                    labels = labels.to(world.device, non_blocking=True)
                    if run.graphs:
                        run.graphs(compute, images, labels, 1)
                    else:
                        compute(images, labels)
                    run.optimizer.step()
                    run.optimizer.zero_grad(set_to_none=True)

            def whole() -> None:
                trainer.state.step = 1  # not 0, where the first batch is drawn
                trainer.train_epoch(0)

            result = compare(bare, whole, rounds, world.device, progress, "bare loop and training loop")
            trainer.log.close()
            run.release()
    yield from result.describe("bare loop", "training loop", steps, "step")
    if result.interrupted:
        raise KeyboardInterrupt
