"""Experiment trackers beside TensorBoard: wandb, trackio, mlflow. Extras: what goes wrong with one stops no training.

Each works in a thread of its own, which takes from a queue: a server that is slow, or gone, holds no step up. The run
folder's trackers.json has the name by which each knows the run, so that a run that goes on is one run there, too.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import queue
import re
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import first_line

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "Trackers", "missing_trackers"]

MOST_WAITING = 10_000  # rows of numbers and pictures that a tracker may be behind
PATIENCE = 30.0  # seconds that the end of a run waits for what is still on its way
PROJECT = "conv2former"
IDS = "trackers.json"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run at its start.

    Attributes:
        folder: of the run; its name is the run's.
        project: to which it belongs; None for what the tracker's own environment variable says, or `PROJECT`.
        config: flat, by dotted keys; values of JSON.
        id: by which the tracker knows the run from an earlier attempt; None for a new one.
    """

    folder: Path
    project: str | None
    config: Mapping[str, Any]
    id: str | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def project_or(self, variable: str) -> str:
        """Returns the project, where none is given that in an environment variable."""
        return self.project or os.environ.get(variable) or PROJECT


class Tracker(Protocol):
    """One package. All methods are called in one thread, in order; any may raise anything."""

    def start(self, run: TrackedRun) -> str:
        """Begins a run, or goes on with one, and returns its id."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Takes numbers by their names, such as `train/loss`."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Takes a PNG file."""

    def finish(self, is_done: bool) -> None:
        """Ends the run; `is_done` is whether it has come to its own end."""


class Wandb:
    """Weights & Biases. WANDB_MODE=offline writes into the run folder, for `wandb sync`."""

    def start(self, run: TrackedRun) -> str:
        self._wandb = wandb = importlib.import_module("wandb")
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):  # it would ask on the terminal
            raise RuntimeError("not logged in; run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=run.project_or("WANDB_PROJECT"),
            name=run.name,
            id=run.id or secrets.token_hex(4),
            resume="allow",
            dir=str(run.folder),
            settings=wandb.Settings(console="off"),  # it would stand between the run and its terminal
        )
        self._run.config.update(dict(run.config), allow_val_change=True)
        return self._run.id

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.step:  # what an earlier attempt has sent is the same, and would be refused
            self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        if step >= self._run.step:
            self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def finish(self, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


class Trackio:
    """Trackio, which knows a run by its name and keeps it on this machine unless it is told otherwise."""

    def start(self, run: TrackedRun) -> str:
        self._trackio = trackio = importlib.import_module("trackio")
        name = run.id or f"{run.name}-{secrets.token_hex(4)}"
        project = run.project_or("TRACKIO_PROJECT")
        self._run = trackio.init(project=project, name=name, config=dict(run.config), resume="allow", embed=False)
        return name

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._trackio.Image(str(path))}, step=step)

    def finish(self, is_done: bool) -> None:
        self._run.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI or where it keeps runs by default."""

    def start(self, run: TrackedRun) -> str:
        mlflow = importlib.import_module("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = client = mlflow.MlflowClient()
        known: set[str] = set()
        if run.id:
            self._id = run.id
            known = set(client.get_run(run.id).data.params)  # which cannot be changed
            client.update_run(run.id, status="RUNNING")
        else:
            project = run.project_or("MLFLOW_EXPERIMENT_NAME")
            experiment = client.get_experiment_by_name(project)
            place = experiment.experiment_id if experiment else client.create_experiment(project)
            self._id = client.create_run(place, run_name=run.name).info.run_id
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in run.config.items()}
        params = [self._entities.Param(key, text[:500]) for key, text in texts.items() if key not in known]
        for first in range(0, len(params), 100):  # at most that many in a request
            self._client.log_batch(self._id, params=params[first : first + 100])
        return self._id

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        metrics = [self._entities.Metric(_mlflow_name(key), value, now, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._id, str(path), "pictures")

    def finish(self, is_done: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_done else "FAILED")


def _mlflow_name(key: str) -> str:
    """Returns a name that MLflow takes: of a class, `recall/a+b`, with a checksum so that no two become one."""
    group, _, name = key.partition("/")
    allowed = re.sub(r"[^\w\- ]", "_", name)
    return key if allowed == name else f"{group}/{allowed}_{zlib.crc32(name.encode('utf-8', 'replace')):08x}"


TRACKERS: dict[str, Callable[[], Tracker]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def missing_trackers(names: Sequence[str]) -> list[str]:
    """Returns those whose package is not installed. A folder of that name, which wandb makes, is no package."""
    found = {name: importlib.util.find_spec(name) for name in names}
    return [name for name, spec in found.items() if spec is None or spec.origin is None]


class Trackers:
    """Hands a run to trackers.

    Args:
        names: keys of `TRACKERS`.
        folder: of the run.
        project: see `TrackedRun`.
        config: see `TrackedRun`.
        warn: called with one line, once at most for each tracker, from the thread that this is used in.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        project: str | None,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        ids = _Ids(folder / IDS)
        self._feeds = [_Feed(name, TrackedRun(folder, project, config, ids.of(name)), ids) for name in names]

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Sends numbers by their names."""
        self._put(lambda tracker: tracker.numbers(step, values))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Sends a PNG file."""
        self._put(lambda tracker: tracker.picture(step, name, path))

    def close(self, is_done: bool) -> None:
        """Ends the run at the trackers, and waits for them, for `PATIENCE` seconds in all."""
        self._put(lambda tracker: tracker.finish(is_done))
        deadline = time.monotonic() + PATIENCE
        for feed in self._feeds:
            feed.close(max(0.0, deadline - time.monotonic()))
        self._say_failures()
        self._feeds = []

    def _put(self, action: Callable[[Tracker], None]) -> None:
        for feed in self._feeds:
            feed.put(action)
        self._say_failures()

    def _say_failures(self) -> None:
        for feed in [feed for feed in self._feeds if feed.failure]:
            self._feeds.remove(feed)
            self._warn(f"warning: {feed.name}: {feed.failure}; the run goes on without {feed.name}")


class _Feed:
    """The thread in which one tracker works, and its queue.

    Attributes:
        failure: why it has given up; '' as long as it works.
    """

    def __init__(self, name: str, run: TrackedRun, ids: _Ids) -> None:
        self.name, self.failure = name, ""
        self._queue: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, args=(run, ids), name=name, daemon=True)
        self._thread.start()

    def put(self, action: Callable[[Tracker], None] | None) -> None:
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self.failure = self.failure or "does not keep up with the run"

    def close(self, seconds: float) -> None:
        self.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.failure = self.failure or f"has not taken everything {PATIENCE:.0f} seconds after the end"

    def _work(self, run: TrackedRun, ids: _Ids) -> None:
        try:
            tracker = TRACKERS[self.name]()
            ids.note(self.name, tracker.start(run))
            while (action := self._queue.get()) is not None:
                action(tracker)
        except (Exception, SystemExit) as e:  # of a package that may raise anything
            self.failure = self.failure or first_line(e)


class _Ids:
    """The file that keeps by which id each tracker knows a run; used by several threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._ids: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(path.read_text("utf-8"))
            if isinstance(found, dict):
                self._ids = {name: id_ for name, id_ in found.items() if isinstance(id_, str)}

    def of(self, name: str) -> str | None:
        return self._ids.get(name)

    def note(self, name: str, id_: str) -> None:
        with self._lock:
            self._ids[name] = id_
            temporary = self._path.with_name(f".{self._path.name}")
            temporary.write_text(json.dumps(self._ids, indent=2) + "\n", "utf-8")
            os.replace(temporary, self._path)
