"""Trackers, played by fakes with the few functions that are used, and by real ones; and TensorBoard's tab HParams."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

from conv2former import ConfigError
from conv2former.engine import trackers, train
from conv2former.engine.logging import RunLog
from conv2former.engine.trackers import TrackedRun, Trackers, missing_trackers
from conv2former.tasks.registry import task_named

from .conftest import configure

NAMES = ("wandb", "trackio", "mlflow")
CONFIG = {"optim.base_lr": 1e-3, "data.root": "photos", "model.checkpoint": None, "optim.betas": [0.9, 0.99]}


class Fake:
    """The three packages. What reaches one is in `rows[NAME]`, as (step, name, value), once it has arrived."""

    def __init__(self, monkeypatch) -> None:
        self.rows: dict[str, list] = {name: [] for name in NAMES}
        self.started: dict[str, list] = {name: [] for name in NAMES}
        self.configs: dict[str, dict] = {name: {} for name in NAMES}
        self.ends: dict[str, list] = {name: [] for name in NAMES}
        self.threads: set[str] = set()
        self.broken, self.mode, self.wandb_step = "", "offline", 0
        for name in NAMES:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="fake")
            monkeypatch.setitem(sys.modules, name, module)
        entities = types.ModuleType("mlflow.entities")
        entities.Param = entities.Metric = lambda *values: values
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
        wandb, trackio, mlflow = (sys.modules[name] for name in NAMES)
        wandb.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))
        wandb.login = lambda prompt: False
        wandb.Settings = dict
        wandb.Image = trackio.Image = lambda path: Path(path).name
        wandb.init, trackio.init = self._wandb, self._trackio
        mlflow.MlflowClient = lambda: FakeMlflow(self)

    def log(self, package: str, values: dict, step: int) -> None:
        self.threads.add(threading.current_thread().name)
        if self.broken == package:
            raise ConnectionError("no route\nto the host")
        self.rows[package] += [(step, name, value) for name, value in values.items()]

    def _wandb(self, **options):
        self.started["wandb"].append(options)
        return types.SimpleNamespace(
            id=options["id"],
            step=self.wandb_step,
            config=types.SimpleNamespace(update=lambda config, allow_val_change: self.configs["wandb"].update(config)),
            log=lambda values, step: self.log("wandb", values, step),
            finish=lambda exit_code: self.ends["wandb"].append(exit_code),
        )

    def _trackio(self, config, **options):
        self.started["trackio"].append(options)
        self.configs["trackio"] = config
        return types.SimpleNamespace(
            log=lambda values, step: self.log("trackio", values, step), finish=lambda: self.ends["trackio"].append(0)
        )


class FakeMlflow:
    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def get_experiment_by_name(self, name):
        return None if name == "new" else types.SimpleNamespace(experiment_id=f"experiment {name}")

    def create_experiment(self, name):
        return f"made {name}"

    def create_run(self, experiment, run_name):
        self.fake.started["mlflow"].append((experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))

    def get_run(self, run_id):
        return types.SimpleNamespace(data=types.SimpleNamespace(params=dict(self.fake.configs["mlflow"])))

    def update_run(self, run_id, status):
        self.fake.started["mlflow"].append((run_id, status))

    def log_batch(self, run_id, params=(), metrics=()):
        assert len(params) <= 100
        for key, text in params:
            assert key not in self.fake.configs["mlflow"], "MLflow changes no parameter"
            self.fake.configs["mlflow"][key] = text
        for key, value, _, step in metrics:
            self.fake.log("mlflow", {key: value}, step)

    def log_artifact(self, run_id, path, folder):
        self.fake.log("mlflow", {folder: Path(path).name}, -1)

    def set_terminated(self, run_id, status):
        self.fake.ends["mlflow"].append(status)


@pytest.fixture
def fake(monkeypatch):
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return Fake(monkeypatch)


def start(folder: Path, names=NAMES, project: str | None = None, said: list | None = None, config=CONFIG) -> Trackers:
    folder.mkdir(exist_ok=True)
    return Trackers(names, folder, project, config, [].append if said is None else said.append)


def test_what_they_are_told(fake, tmp_path):
    board = start(tmp_path / "oaks")
    board.numbers(10, {"train/loss": 1.5, "recall/a+b": 50.0, "recall/a&b": 40.0})
    board.picture(10, "curves", tmp_path / "curves.png")
    board.close(True)
    rows = [(10, "train/loss", 1.5), (10, "recall/a+b", 50.0), (10, "recall/a&b", 40.0)]
    assert fake.rows["wandb"] == fake.rows["trackio"] == [*rows, (10, "curves", "curves.png")]
    names = [name for _, name, _ in fake.rows["mlflow"]]
    assert (names[0], names[3]) == ("train/loss", "pictures")
    assert len(set(names)) == 4
    assert all(name.startswith("recall/a_b_") for name in names[1:3])  # MLflow takes no + in a name
    assert fake.ends == {"wandb": [0], "trackio": [0], "mlflow": ["FINISHED"]}
    assert fake.configs["wandb"] == fake.configs["trackio"] == CONFIG
    assert fake.configs["mlflow"] == {
        "optim.base_lr": "0.001", "data.root": "photos", "model.checkpoint": "null", "optim.betas": "[0.9, 0.99]",
    }  # fmt: skip
    (wandb,), (trackio,) = fake.started["wandb"], fake.started["trackio"]
    assert (wandb["project"], wandb["name"], wandb["dir"]) == ("conv2former", "oaks", str(tmp_path / "oaks"))
    assert trackio["name"].startswith("oaks-")
    assert fake.started["mlflow"] == [("experiment conv2former", "oaks")]
    assert fake.threads == set(NAMES)  # not the one that trains


def test_a_run_that_goes_on_is_the_same_there(fake, tmp_path):
    start(tmp_path / "run").close(False)
    ids = json.loads((tmp_path / "run" / "trackers.json").read_text())
    assert ids.keys() == set(NAMES)
    fake.wandb_step = 8  # the attempt before has sent step 7
    board = start(tmp_path / "run", config={**CONFIG, "optim.base_lr": 2.0, "log.every_steps": 5})
    board.numbers(7, {"train/loss": 1.0})
    board.numbers(8, {"train/loss": 0.5})
    board.close(True)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == ids
    assert [options["id"] for options in fake.started["wandb"]] == [ids["wandb"]] * 2
    assert [options["name"] for options in fake.started["trackio"]] == [ids["trackio"]] * 2
    assert fake.started["mlflow"][1:] == [("m1", "RUNNING")]
    assert fake.rows["wandb"] == [(8, "train/loss", 0.5)]
    assert fake.configs["mlflow"].keys() == {*CONFIG, "log.every_steps"}
    assert fake.ends == {"wandb": [1, 0], "trackio": [0, 0], "mlflow": ["FAILED", "FINISHED"]}
    start(tmp_path / "other").close(True)
    assert fake.started["wandb"][2]["id"] != ids["wandb"]


def test_the_project(fake, tmp_path, monkeypatch):
    start(tmp_path / "a", project="new").close(True)
    monkeypatch.setenv("WANDB_PROJECT", "trees")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "woods")
    start(tmp_path / "b").close(True)
    start(tmp_path / "c", project="mine").close(True)
    assert [options["project"] for options in fake.started["wandb"]] == ["new", "trees", "mine"]
    assert [place for place, _ in fake.started["mlflow"]] == ["made new", "experiment woods", "experiment mine"]


@pytest.mark.parametrize("name", NAMES)
def test_one_that_fails_is_said_once_and_the_others_go_on(fake, tmp_path, name):
    fake.broken, said = name, []
    board = start(tmp_path / "run", said=said)
    threads = {thread.name: thread for thread in threading.enumerate()}
    board.numbers(0, {"train/loss": 1.0})
    threads[name].join(20)  # it has failed, and is then no longer asked
    for step in range(1, 20):
        board.numbers(step, {"train/loss": 1.0})
    board.close(True)
    assert said == [f"warning: {name}: no route; the run goes on without {name}"]
    for other in set(NAMES) - {name}:
        assert len(fake.rows[other]) == 20


def test_nobody_is_asked_for_a_password(fake, tmp_path):
    fake.mode, said = "online", []
    start(tmp_path / "run", ["wandb"], said=said).close(True)
    assert len(said) == 1
    assert "not logged in; run `wandb login`" in said[0]
    assert not fake.started["wandb"]


@pytest.mark.parametrize("most_waiting", [5, 10_000])
def test_one_that_hangs_holds_nothing_up(tmp_path, monkeypatch, most_waiting):
    """Neither while the run goes on, whether or not its queue fills, nor at the end."""
    hangs = threading.Event()

    class Hanging:
        def start(self, run: TrackedRun) -> str:
            hangs.wait(60)
            return "x"

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Hanging)
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    monkeypatch.setattr(trackers, "MOST_WAITING", most_waiting)
    said: list[str] = []
    begin = time.monotonic()
    board = start(tmp_path / "run", ["wandb"], said=said)
    for step in range(100):
        board.numbers(step, {"train/loss": 1.0})
    assert bool(said) == (most_waiting == 5)
    board.close(True)
    assert time.monotonic() - begin < 30
    hangs.set()
    assert len(said) == 1
    assert ("does not keep up" if most_waiting == 5 else "has not taken everything") in said[0]


def test_one_that_is_not_installed_is_a_mistake(raw_config, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # which wandb makes beside the runs, and is no package
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        assert missing_trackers(["wandb", "mlflow"]) == ["wandb", "mlflow"]
    monkeypatch.setattr("conv2former.engine.build.missing_trackers", list)
    with pytest.raises(
        ConfigError, match=r'log\.trackers: not installed: mlflow; pip install "conv2former\[mlflow\]", or'
    ):
        train(configure(raw_config, log__trackers="mlflow"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"log\.trackers.*: input should be 'wandb', 'trackio' or 'mlflow'"):
        configure(raw_config, log__trackers=["neptune"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_real_one_without_a_network(tmp_path, monkeypatch, name):
    """Where it is installed: two attempts are one run, and nothing goes wrong."""
    for variable, value in (
        ("WANDB_MODE", "offline"), ("TRACKIO_DIR", str(tmp_path)), ("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db"),
    ):  # fmt: skip
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    imsave(tmp_path / "curves.png", np.zeros((4, 4, 3)))
    said, ids = [], []
    for attempt in range(2):
        board = start(tmp_path / "run", [name], said=said)
        board.numbers(attempt, {"train/loss": 1.0, "recall/a+b": 1.0})
        board.picture(attempt, "curves", tmp_path / "curves.png")
        board.close(attempt == 1)
        ids.append((tmp_path / "run" / "trackers.json").read_text())
    assert said == []
    assert ids[0] == ids[1]


@pytest.mark.slow
def test_a_run_with_trackers(raw_config, tmp_path, fake, with_pictures):
    short = {"schedule__epochs": 2, "schedule__warmup_epochs": 0, "schedule__cooldown_epochs": 0}
    config = configure(raw_config, **short, log__trackers=list(NAMES), log__tensorboard=True)
    report = train(config, tmp_path / "run")
    rows = fake.rows["trackio"]
    assert rows == fake.rows["wandb"]
    names = {name for _, name, _ in rows}
    assert {"train/loss", "eval/top1", "eval/ema_macro_f1", "recall/a", "ema_recall/c", "best/epoch"} <= names
    assert {"first_batch", "curves", "confusion"} <= names
    assert not [name for name in names if "top5" in name]
    best = [value for _, name, value in rows if name == "best/balanced_accuracy"]
    assert best[-1] == report["balanced_accuracy"]
    assert fake.configs["wandb"]["optim.base_lr"] == 1e-3
    assert len(fake.configs["mlflow"]) > 90
    assert fake.ends["mlflow"] == ["FINISHED"]
    events, hparams = read_board(tmp_path / "run" / "tensorboard")
    assert [event.value for event in events.Scalars("ema_recall/a")]
    assert hparams["session_start_info"].hparams["optim.base_lr"].number_value == 1e-3
    assert hparams["session_start_info"].hparams["data.root"].string_value == raw_config["data"]["root"]


def read_board(folder: Path):
    """Returns what TensorBoard reads in a folder, and what its HParams tab does, by kind."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    assert all(path.is_file() for path in folder.iterdir())  # one run, without others below it
    events = EventAccumulator(str(folder))
    events.Reload()
    contents = [HParamsPluginData.FromString(data) for data in events.PluginTagToContent("hparams").values()]
    return events, {content.WhichOneof("data"): getattr(content, content.WhichOneof("data")) for content in contents}


def test_the_settings_and_the_best_are_in_tensorboard(tmp_path):
    """In the run's own folder, also where it went on; the end only when it has come."""
    config = {"optim": {"base_lr": 1e-3, "betas": [0.9, 0.99]}, "ema": {"decay": None}, "train": {"tf32": True}}
    found = {}
    for first, is_done in ((0, False), (1, True)):
        log = RunLog(tmp_path, 10, first, tensorboard=True, is_main=True, best=task_named("classification").metrics)
        log.begin(config, (), None)
        row = {"top1": 50.0 + first, "loss": 1.0, "macro_f1": 40.0, "balanced_accuracy": 45.0, "n": 4}
        row = {**row, "recall/a\n": 30.0}
        log.evaluation(first + 1, first + 1, {**row, **{f"ema_{key}": value + 1 for key, value in row.items()}}, "ema_")
        log.evaluation(first + 2, first + 2, row)  # no better
        log.close(is_done)
        events, found[is_done] = read_board(tmp_path / "tensorboard")
    assert {key: value.WhichOneof("kind") for key, value in found[False]["session_start_info"].hparams.items()} == {
        "optim.base_lr": "number_value", "optim.betas": "string_value", "ema.decay": "string_value",
        "train.tf32": "string_value",
    }  # fmt: skip
    assert [info.name.tag for info in found[False]["experiment"].metric_infos] == [
        f"best/{key}" for key in ("epoch", "top1", "loss", "macro_f1", "balanced_accuracy")
    ]
    assert "session_end_info" not in found[False]
    assert "session_end_info" in found[True]
    assert [event.value for event in events.Scalars("best/top1")] == [51.0, 52.0]
    assert [event.value for event in events.Scalars("best/epoch")] == [1, 2]
    assert "recall/a\\n" in events.Tags()["scalars"]
