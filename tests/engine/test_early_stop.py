"""Which weights are the best, and when a run that gets no better ends."""

from __future__ import annotations

import json

import pytest
import torch

from conv2former import ConfigError
from conv2former.commands.train import summary
from conv2former.config import check_config, load_config
from conv2former.engine import train, trainer
from conv2former.engine.early_stop import columns, stop_reason
from conv2former.tasks.registry import task_named

from .conftest import configure

COLUMNS = columns(task_named("classification").metrics)


def history(metric: str, values: list[float]) -> list[list[float]]:
    return [[epoch, *(value if key == metric else 0.0 for key in COLUMNS[1:])] for epoch, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("settings", "metric", "values", "reason"),
    [
        ({"patience": 2}, "top1", [50, 51, 51], ""),
        ({"patience": 2}, "top1", [50, 51, 51, 50], "top-1 has not risen for 2 evaluations (best: 51.00 % at epoch 2)"),
        ({"patience": 2}, "top1", [50, 40, 51, 40], ""),
        ({"patience": 2}, "top1", [50, 49, 48, 51], ""),  # as after a patience that was raised
        ({"patience": 1}, "top1", [50], ""),
        ({"patience": 1}, "top1", [], ""),
        ({"patience": 1, "min_delta": 1.0}, "top1", [50, 51.5], ""),
        (
            {"patience": 2, "min_delta": 1.0}, "top1", [50, 50.9, 51.0],
            "top-1 has not risen by more than 1 points for 2 evaluations (best: 50.00 % at epoch 1)",
        ),
        (
            {"patience": 1, "metric": "loss"}, "loss", [1.0, 0.5, 0.6],
            "the loss has not fallen for 1 evaluation (best: 0.5000 at epoch 2)",
        ),
        ({"patience": 1, "metric": "loss"}, "loss", [1.0, 0.5, 0.4], ""),
        ({"patience": 1, "metric": "loss", "min_delta": 0.2}, "loss", [1.0, 0.9], "by more than 0.2 for 1"),
        ({"patience": 1, "metric": "macro_f1"}, "macro_f1", [50, 40], "macro-F1 has not risen"),
        ({"patience": 1, "metric": "macro_f1"}, "balanced_accuracy", [50, 60], "macro-F1 has not risen"),
        ({"patience": 1, "metric": "balanced_accuracy"}, "balanced_accuracy", [50, 40], "balanced accuracy has not"),
    ],
)  # fmt: skip
def test_when_it_ends(settings, metric, values, reason):
    config = check_config({"data": {"root": "x"}, "train": {"early_stop": settings}}, "test")
    found = stop_reason(config, history(metric, values))
    assert (reason in found) if reason else (found == "")


def test_its_metric_is_that_of_the_best_unless_it_has_its_own():
    raw = {"data": {"root": "x"}, "train": {"early_stop": {"patience": 1}}, "checkpoint": {"metric": "loss"}}
    assert stop_reason(check_config(raw, "test"), history("loss", [1.0, 2.0])).startswith("the loss")
    assert stop_reason(check_config({**raw, "train": {}}, "test"), history("loss", [1.0, 2.0])) == ""


def test_the_setting(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: {root: x}\ntrain: {early_stop: null}\n")  # as the run folder's config.yaml has it
    config = load_config(file, ["train.early_stop.patience=3", "train.early_stop.metric=loss"])
    assert config.train.early_stop.model_dump() == {"patience": 3, "metric": "loss", "min_delta": 0.0}
    for word, message in (
        ("train.early_stop.patience=0", "train.early_stop.patience: input should be greater than or equal to 1"),
        ("train.early_stop.metric=top5", "train.early_stop.patience: field required"),
        ("train.early_stop.patient=3", "train.early_stop.patient: unknown key (did you mean 'patience'?)"),
        ("train.early_stop=3", "train.early_stop: "),
        ("train.early_stop.patience.x=3", "train.early_stop.patience: "),
    ):
        with pytest.raises(ConfigError) as error:
            load_config(file, [word])
        assert message in str(error.value)


@pytest.fixture
def played(monkeypatch):
    """Makes the evaluation of each epoch, of one step, find what a list says: {epoch: metrics}."""
    metrics: dict[int, dict[str, float]] = {}
    real, real_step, done = trainer.evaluate, trainer.train_step, [0]

    def evaluate(model, *args):
        result = real(model, *args)
        result.metrics.update(metrics.get(done[0], {}))
        return result

    def step(run, window, number, check):
        done[0] = number + 1
        return real_step(run, window, number, check)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    monkeypatch.setattr(trainer, "train_step", step)
    return metrics


@pytest.fixture
def quick(raw_config):
    """One step in an epoch, ten epochs, no average."""
    plain = {"schedule__epochs": 10, "schedule__warmup_epochs": 0, "schedule__cooldown_epochs": 0, "ema__decay": None}
    return configure(raw_config, **plain, train__batch_size=22, log__every_steps=1).to_dict()


@pytest.mark.slow
def test_a_run_ends_early_and_is_as_one_that_was_killed(quick, played, tmp_path, monkeypatch, capsys):
    """Killed after epoch 3, it has seen no progress for one evaluation, and needs two more."""
    accuracies = [40.0, 60.0, 50.0, 60.0, 55.0, 99.0, 98.0, 98.0, 98.0, 98.0]
    played.update({epoch: {"top1": top1, "loss": 1.0} for epoch, top1 in enumerate(accuracies, 1)})
    config = configure(quick, train__early_stop={"patience": 3})
    report = train(config, tmp_path / "whole")
    text = "stopped early after epoch 5 of 10: top-1 has not risen for 3 evaluations (best: 60.00 % at epoch 2)"
    assert text in capsys.readouterr().out.split("\n")
    assert text in (tmp_path / "whole" / "train.log").read_text()
    assert (report["epoch"], report["epochs"], report["epochs_done"], report["steps"]) == (2, 10, 5, 5)
    assert report["stopped_early"] == text.partition(": ")[2]
    assert report == json.loads((tmp_path / "whole" / "report.json").read_text())
    assert "epoch 2 of 10, stopped early after 5" in "\n".join(summary(report, tmp_path))
    assert torch.load(tmp_path / "whole" / "checkpoints" / "best.pt")["epoch"] == 2

    killed = trainer.Trainer.train_epoch
    monkeypatch.setattr(
        trainer.Trainer, "train_epoch", lambda self, epoch: 1 / 0 if epoch == 3 else killed(self, epoch)
    )
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "parts")
    monkeypatch.setattr(trainer.Trainer, "train_epoch", killed)
    assert train(config, tmp_path / "parts")["stopped_early"] == report["stopped_early"]
    assert (
        torch.load(tmp_path / "parts" / "checkpoints" / "last.pt")["history"]
        == torch.load(tmp_path / "whole" / "checkpoints" / "last.pt")["history"]
    )

    capsys.readouterr()
    again = train(config, tmp_path / "whole")  # says so and does nothing
    hint = "; to go on, raise train.early_stop.patience or set train.early_stop=null"
    assert text + hint in capsys.readouterr().out.split("\n")
    assert (again["steps"], again["top1"]) == (5, 60.0)
    more = train(configure(quick, train__early_stop={"patience": 4}), tmp_path / "whole")
    # no progress for four evaluations at the last epoch is an end like any other
    assert (more["epoch"], more["steps"], more["stopped_early"]) == (6, 10, "")


@pytest.mark.slow
def test_the_lost_best_of_a_run_that_ended_early(quick, played, tmp_path, capsys):
    """As of a finished run, its last weights take the place."""
    played.update({epoch: {"top1": 60.0 - epoch, "loss": 1.0} for epoch in range(1, 4)})
    config = configure(quick, train__early_stop={"patience": 2}, checkpoint__keep=1)
    train(config, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "best.pt").unlink()
    report = train(config, tmp_path / "run")
    assert "are lost" in capsys.readouterr().out
    assert (report["epoch"], report["steps"]) == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "best"), [("top1", 3), ("loss", 2), ("macro_f1", 1), ("balanced_accuracy", 4)]
)  # fmt: skip
def test_what_is_the_best(quick, played, tmp_path, metric, best):
    """Epochs 3 and 4 have the same balanced accuracy: the one of the lower loss."""
    played.update({
        1: {"top1": 10.0, "loss": 4.0, "macro_f1": 90.0, "balanced_accuracy": 10.0},
        2: {"top1": 20.0, "loss": 1.0, "macro_f1": 20.0, "balanced_accuracy": 10.0},
        3: {"top1": 90.0, "loss": 3.0, "macro_f1": 30.0, "balanced_accuracy": 80.0},
        4: {"top1": 40.0, "loss": 2.0, "macro_f1": 40.0, "balanced_accuracy": 80.0},
    })  # fmt: skip
    config = configure(quick, schedule__epochs=4, checkpoint__metric=metric)
    report = train(config, tmp_path / "run")
    assert report["epoch"] == torch.load(report["checkpoint"])["epoch"] == best
    for key, value in played[best].items():
        assert report[key] == value
