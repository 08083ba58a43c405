"""A linear probe of the weights that a run starts from, fitted before its first step."""

from __future__ import annotations

from ..data import batches, running_workers
from ..tasks.task import LinearProbe
from .build import Run
from .distributed import World
from .evaluate import evaluate, shown
from .prepare import Job
from .signals import StopSignal, ignore_stop_signals
from .skipped import SkippedImages

__all__ = ["StartingProbe"]


class StartingProbe:
    """Gives the network's classifier, and that of the average, the weights of a linear probe, and takes them back.

    Args:
        job: the run.
        run: what it trains.
        world: the processes, which all do the same.
        probe: of the run's task, for its network.
    """

    def __init__(self, job: Job, run: Run, world: World, probe: LinearProbe) -> None:
        self.job, self.run, self.world, self.probe = job, run, world, probe

    def fit(self, signal: StopSignal, skipped: SkippedImages) -> str | None:
        """Fits it to the training images, not augmented.

        Args:
            signal: which ends this early.
            skipped: where it is noted what cannot be read.

        Returns:
            Why there is no probe, as a line; '' if there is one; None after a signal. Without one nothing has changed.
        """
        if problem := self.probe.problem(self.job.train_source):
            return f"no linear probe: {problem}"
        some = self.probe.some_of(self.job.train_source)
        loader = self.job.task.eval_loader(self.job.config, some, self.world, ignore_stop_signals)
        self.world.at("the features of a linear probe")
        with running_workers(loader):
            found = evaluate(
                self.run.model,
                shown(batches(loader), len(some), "linear probe", self.world.size, leave=False),
                self.world,
                self.run.autocast,
                self.probe,
                lambda: signal.name is not None,
                cuda_graph=False,  # in which the features would not be seen
            )
        if found is None:
            return None
        problem, unreadable = found
        skipped.note("training", unreadable)
        if problem:
            return f"no linear probe: {problem}"
        self._copy_to_average()
        return ""

    @property
    def stays(self) -> bool:
        """Whether training starts from it."""
        return self.probe.stays

    def undo(self) -> None:
        """Gives the classifier the weights that it had."""
        self.probe.undo()
        self._copy_to_average()

    def _copy_to_average(self) -> None:
        if self.run.ema:  # before the first step it is the network itself
            self.run.ema.module.load_state_dict(self.run.model.state_dict())
