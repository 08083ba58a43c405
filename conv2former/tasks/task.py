"""What a task is: all by which training one kind of network differs from training another, in one object.

`engine/` has the one loop, and knows a task by `Task` alone; `registry.py` finds it by the configuration's key `task`.
A task is told what it needs, holds nothing of a run, and is the same in every process. Who calls what, in order:

    prepare.py     check, check_output, open_data, settle_data, build_model: what can be wrong, before processes meet;
                   then write_split and notes, in the main process
    build.py       freeze, compile_model, objective; no_graph says why steps can be no CUDA graph
    trainer.py     statistics, train_loader, eval_loader, hidden_metrics; for an evaluation evaluator, result_line,
                   about_first_evaluation
    summary.py     about_data
    step.py        Objective.prepare and Objective.loss, once for each accumulation step
    evaluate.py    Evaluator.update for each batch, Evaluator.total once, in all processes
    report.py      batch_figure before the first step, result_figures and report at the end; of the report
                   commands/train.py prints summarise and last_text
    dryrun.py      known_classes, synthetic_batch
    tools          restore; what else they do with a checkpoint of the task is in tools/*/registry.py
    early_stop.py, state.py, saved.py, logging.py    metrics, headline, details and check_details: see `Task`

A batch has `images`, of which `len` is their number, and `skipped`; all else in it is between a task's collate, its
objective and its evaluator. What a task must promise, and what it then has for nothing:

    mid-epoch resume, kills   every draw of its loaders is a function of (seed, epoch, index), as data/loader.py's are;
                              `prepare` is called when torch, NumPy and Python are seeded for (step, accumulation step,
                              rank), and draws from nothing else
    accumulation, DDP         a loss is the mean over the process's images and calls `forward` once; gradients are then
                              the means over microbatches and processes. `forward` takes any arguments, so that a
                              network may be given its targets and return losses
    precision, fp16           `forward` runs under autocast, what is done with its result does not
    CUDA graphs               inputs and targets are a tensor each, `loss` reads no other that moves and never waits
                              for the device; else `no_graph` says why not, and all is computed plainly
    EMA, SyncBN               nothing: they see modules
    freezing, torch.compile   `freeze`, `compile_model`; the defaults are for a classifier of the registry
    layer decay               the network has timm's `group_matcher`, which puts a head's layers above its backbone's
    drop path                 `build_model` reads the section `model`
    keys that are `auto`      its configuration's class names them, and says what fits
    data.cache                the splits are `DataSource`s; else its configuration refuses the key
    exact evaluation          `total` counts every image once, by `Processes.sum` and `Processes.gather`
    early stop, best.pt       every evaluation has the keys of `metrics_of` the run; of equal ones that of the lower
                              `loss` is the best, where there is a loss
    metrics.jsonl, TensorBoard, trackers    flat names to numbers; `recall/cat` is a curve of its own
    report.json, checkpoints  plain types; `details` of the best evaluation are in every checkpoint
    kill test, comparison of runs    nothing; the benchmark of the loop times classification, through its objective

Images of different sizes are a list, and their targets may be a list of dicts: the loaders collate to lists, `prepare`
moves them, `loss` is the sum of what `forward(images, targets)` returns in training mode, and `no_graph` says that
sizes differ. Answers that are counted all together, `update` keeps on the CPU, each with its image's index, and `total`
gathers and sorts them. Where there is no validation loss, `metrics` has none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config.base import BaseConfig
from ..config.resolve import Plan
from ..data import EpochSampler, Skipped
from ..models import CheckpointInfo
from ..models.restore import restore
from . import network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AnyBatch", "Evaluation", "Evaluator", "LinearProbe", "Metric", "Objective", "Processes", "Split", "Task"]


class Processes(Protocol):
    """The processes of a run, as a task sees them; see `engine.distributed.World`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum over all processes, which all call it."""

    def gather(self, value: Any) -> list[Any]:
        """Returns every process's value, any picklable object, in the order of ranks; all call it."""


class Split(Protocol):
    """A split of a data set. `len` is the number of its images, in an epoch; 0 of a stream for evaluation.

    One that has a `note`, such as a line about images that are held out, has it printed as the run begins.
    """

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def class_names(self) -> list[str]:
        """What is told apart, in index order; empty where a task has no classes."""

    def __len__(self) -> int: ...


class AnyBatch(Protocol):
    """What a loader yields, and all that the engine knows of it."""

    @property
    def images(self) -> Sized:
        """(N, channels, H, W), or a list of N."""

    @property
    def skipped(self) -> list[Skipped]:
        """What could not be read."""


@dataclass(frozen=True)
class Metric:
    """A number of every evaluation, by which weights can be chosen.

    Attributes:
        label: in a sentence, `top-1`.
        is_percent: whether it is a percentage, shown with two digits, or any number, shown with four.
        higher_is_better: whether the best is the highest.
    """

    label: str
    is_percent: bool = True
    higher_is_better: bool = True

    def text(self, value: float) -> str:
        return f"{value:.2f} %" if self.is_percent else f"{value:.4f}"

    def is_better(self, value: float, best: float, min_delta: float = 0.0) -> bool:
        """Returns whether a value is better than the best one by more than `min_delta`."""
        return value > best + min_delta if self.higher_is_better else value < best - min_delta


class Evaluation(Protocol):
    """What an evaluation found, over all processes and the same on each but for `skipped`."""

    @property
    def metrics(self) -> dict[str, float]:
        """The task's `metrics_of` the run, others, and `n`, the number of images."""

    @property
    def skipped(self) -> list[Skipped]:
        """This process's unreadable images."""

    def row(self, class_names: Sequence[str]) -> dict[str, float]:
        """Returns what is logged: the metrics, and those of single classes where they are few enough."""

    def details(self) -> dict[str, Any]:
        """Returns what checkpoints keep of the best one, and pictures and report are made of: plain types by name."""


class Evaluator(Protocol):
    """Counts what a network answers, batch by batch on each process; nothing is exchanged before the end."""

    def update(self, answer: Callable[[Any], Any], batch: Any) -> None:
        """Counts a batch that has images.

        Args:
            answer: the network in evaluation mode, under autocast; on a GPU perhaps a CUDA graph, of one tensor.
            batch: as the task's loader yields it, on the CPU.
        """

    def total(self, world: Processes, skipped: list[Skipped]) -> Any:
        """Returns the `Evaluation` over all processes; every one calls it, also one that had no image."""


class LinearProbe(Evaluator, Protocol):
    """Fits a network's classifier to the features that it has of images, as it is evaluated on them.

    `stays` is whether training starts from it. `total` gives the classifier the weights that fit best, the same on
    every process, and returns why that cannot be, as a part of a sentence, or '', and this process's unreadable images.
    If it cannot be, nothing has changed.
    """

    @property
    def stays(self) -> bool: ...

    def problem(self, source: Any) -> str:
        """Returns why there is none for a training split, as a part of a sentence; '' if there is one."""

    def some_of(self, source: Any) -> Any:
        """Returns the images of a training split that it looks at, as a split."""

    def undo(self) -> None:
        """Gives the classifier the weights that it had."""


class Objective(Protocol):
    """What the steps of a run minimise, in one process."""

    def prepare(self, batch: Any, step: int) -> tuple[Any, Any]:
        """Returns inputs and targets on the device, mixed if so configured; the same for the same seed and step.

        It may change the batch's tensors, which nobody uses afterwards.
        """

    def loss(self, forward: Callable[..., Any], inputs: Any, targets: Any) -> Tensor:
        """Returns the mean loss over the images, scalar, float32, with a graph for the backward pass.

        Args:
            forward: the network in training mode, under autocast, wrapped for several processes.
            inputs, targets: as `prepare` returns them.
        """


class Task(Protocol):
    """A task. Its configuration's class says its sections, see config/base.py; methods here take a checked one.

    Attributes:
        name: as the configuration has it, `task: NAME`.
        config: the class of its configurations.
        metrics: those by which weights can be chosen (`checkpoint.metric`, `train.early_stop.metric`), in the order of
            the columns of a checkpoint's `history`.
        optional: of these, the last ones, which not every network of the task has; see `metrics_of`.
        headline: of these, the one that curves, checkpoints (`metric`, `best_metric`) and messages show.
        curve_title: above the curve of the headline.
        pictures: what `result_figures` draws, by the name of the file, and what the end of a run calls it.
        details: the keys of an evaluation's `details`, each with what says whether a value read from a file is one.
        no_graph: why no step or evaluation of it can be a CUDA graph, as a part of a sentence; '' if they can.
    """

    name: ClassVar[str]
    config: ClassVar[type[BaseConfig]]
    metrics: ClassVar[Mapping[str, Metric]]
    optional: ClassVar[frozenset[str]] = frozenset()
    headline: ClassVar[str]
    curve_title: ClassVar[str]
    pictures: ClassVar[Mapping[str, str]] = {}
    details: ClassVar[Mapping[str, Callable[[Any], bool]]] = {}
    no_graph: ClassVar[str] = ""

    # ------------------------------------------------------------------------------------------- configuration and data

    def check(self, config: Any) -> None:
        """Checks what needs more than the schema and no data, such as names of augmentations; raises ConfigErrors."""
        return None

    def check_output(self, config: Any, output: Path) -> None:
        """Checks that the run folder does not lie where it would become data; raises an OutputError."""
        return None

    @abstractmethod
    def open_data(self, config: Any) -> tuple[Any, Any]:
        """Returns the training and the validation `Split`, checked as far as a run needs; raises DataErrors.

        Every process does this by itself before they meet; `RANK` and `WORLD_SIZE` are in the environment.
        """

    def settle_data(self, config: Any, train: Any, val: Any) -> Any:
        """Returns the configuration with what it is to note of the data."""
        return config

    def write_split(self, config: Any, train: Any, val: Any, output: Path) -> None:
        """Writes into the run folder which images are used for what, where that is not in the data."""
        return None

    def notes(self, config: Any, train: Any, val: Any, output: Path) -> list[str]:
        """Returns lines about the data that a run begins with."""
        return []

    def about_data(self, config: Any, train: Any, val: Any) -> list[str]:
        """Returns lines about what is trained and validated on, after the line with the numbers of images."""
        return []

    def known_classes(self, config: Any) -> int | None:
        """Returns how many classes there are if the configuration says it; None where only the data does."""
        return None

    @abstractmethod
    def train_loader(
        self, config: Any, source: Any, world: Processes, worker_init: Any
    ) -> tuple[EpochSampler, DataLoader]:
        """Returns the sampler, which is told epoch and step, and the loader of training batches that follows it.

        Args:
            config: the run.
            source: the training split.
            world: the processes; batches are to be on `world.device` or on their way.
            worker_init: to call in every worker process with its number.
        """

    @abstractmethod
    def eval_loader(self, config: Any, source: Any, world: Processes, worker_init: Any) -> DataLoader:
        """As `train_loader`, of this process's share of the validation split: every image on just one process."""

    @abstractmethod
    def synthetic_batch(self, config: Any, num_classes: int, size: int, generator: torch.Generator) -> Any:
        """Returns a batch of random images and targets on the CPU, for a dry run."""

    # ------------------------------------------------------------------------------------------------------ the network

    @abstractmethod
    def build_model(self, config: Any, num_classes: int, class_names: Sequence[str] | None) -> nn.Module:
        """Builds the network on the CPU with its starting weights; the same seed gives the same.

        Args:
            config: the run.
            num_classes: of the data.
            class_names: of the data, in index order; None where they are not known.
        """

    def freeze(self, model: nn.Module, until: str) -> None:
        """Freezes what `model.freeze` says, and puts it into evaluation mode; called again after `model.train()`."""
        network.freeze(model, until)

    def linear_probe(self, config: Any, model: nn.Module, device: torch.device) -> LinearProbe | None:
        """Returns the linear probe of its starting weights with which a run begins; None for none."""
        return None

    def compile_model(self, model: nn.Module) -> nn.Module:
        """Returns what to train the network through so that torch.compile computes it."""
        return network.compile_network(model)

    def restore(
        self, content: Mapping[str, Any], path: str | Path, use_ema: bool = True, expect: str | Path | None = None
    ) -> tuple[Any, CheckpointInfo]:
        """Builds the network that a checkpoint of the task holds, in evaluation mode; see `models.load_model`."""
        return restore(content, path, use_ema, expect)

    def statistics(self, config: Any, train: Any) -> Any:
        """Returns what the objective needs to know of the training split, such as how many images a class has."""
        return None

    @abstractmethod
    def objective(self, config: Any, plan: Plan, device: torch.device, model: nn.Module, statistics: Any) -> Objective:
        """Returns what the run minimises.

        Args:
            config: the run.
            plan: its numbers.
            device: of the network, which has moved there.
            model: the network, for what it says of itself.
            statistics: as `statistics` returned them; None where they are not known.
        """

    # ------------------------------------------------------------------------------------------- evaluation and results

    @abstractmethod
    def evaluator(self, config: Any, class_names: Sequence[str], device: torch.device) -> Evaluator:
        """Returns a fresh evaluator, for classes in index order and a network on a device."""

    def metrics_of(self, config: Any) -> Mapping[str, Metric]:
        """Returns the `metrics` that every evaluation of a run has: all, or all but those that are `optional`."""
        return self.metrics

    def check_details(self, details: Mapping[str, Any], num_classes: int) -> None:
        """Checks that what a checkpoint keeps of its best evaluation fits the data; raises ValueErrors."""
        return None

    def hidden_metrics(self, num_classes: int) -> tuple[str, ...]:
        """Returns the keys of metrics that say nothing for so few classes and are not shown."""
        return ()

    def about_first_evaluation(self, evaluation: Any, class_names: Sequence[str]) -> list[str]:
        """Returns lines about what a run's first evaluation shows of the data."""
        return []

    @abstractmethod
    def result_line(self, row: Mapping[str, float], has_average: bool, num_classes: int) -> str:
        """Returns an evaluation's metrics as a line: of the weights, and of their average (ema_...) if there is one."""

    def batch_figure(self, config: Any, inputs: Any, targets: Any, class_names: list[str]) -> Figure | None:
        """Draws inputs and targets as the network will see them; None for no picture."""
        return None

    def result_figures(self, details: Mapping[str, Any], class_names: list[str]) -> dict[str, Figure | None]:
        """Draws the best evaluation: each of `pictures`, None for one that cannot be drawn."""
        return {}

    def report(self, best: Mapping[str, float], details: Mapping[str, Any], class_names: list[str]) -> dict[str, Any]:
        """Returns what report.json says of the best evaluation, plain types.

        Args:
            best: its metrics, those of the weights that loading the checkpoint takes; of an earlier version's run some
                may be missing.
            details: of it; values may be None.
            class_names: in index order.
        """
        return {key: best.get(key) for key in self.metrics}

    @abstractmethod
    def summarise(self, report: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Returns the best result in a few words, and lines that follow it, from a report."""

    def last_text(self, report: Mapping[str, Any]) -> str:
        """Returns the headline metric of the last weights as text, '' where they were not evaluated."""
        value, metric = report[f"last_{self.headline}"], self.metrics[self.headline]
        return "" if value is None else f"{metric.label} {metric.text(value)}"
