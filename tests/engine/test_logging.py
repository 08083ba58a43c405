from __future__ import annotations

import errno
import json
import math
import os
import threading
import time

import numpy as np
import pytest
import torch
from tensorboard.summary.writer import event_file_writer

from conv2former.engine import World, meter, trainer
from conv2former.engine.evaluate import evaluate
from conv2former.engine.logging import RunLog, read_metrics
from conv2former.engine.meter import MeanLoss, Meter, describe_waiting
from conv2former.engine.tensorboard import TensorBoard
from conv2former.engine.trainer import train

ROW = {"loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "memory_gib": 1.0}


def test_the_meter(monkeypatch):
    """In two attempts: 1 s of waiting in 5 s, an evaluation that does not count, 1 s of waiting in 2 s."""
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])

    def spend(meter, waiting: float, working: float) -> None:
        with meter.waiting():
            now[0] += waiting
        meter.images += 10
        now[0] += working

    first = Meter()
    assert first.share_waited is None
    spend(first, 0.5, 1.5)
    spend(first, 0.5, 2.5)
    assert first.read() == {"images_per_second": 4.0, "data_wait": 0.2}
    now[0] += 1000.0
    second = Meter(first.seconds, first.waited)
    now[0] += 1000.0
    second.start()
    spend(second, 1.0, 1.0)
    assert second.read() == {"images_per_second": 5.0, "data_wait": 0.5}
    assert second.share_waited == pytest.approx(2 / 7, abs=1e-4)


def test_the_mean_loss():
    """Of two processes, one of which has had an overflow, and after a change of the number of processes."""

    class Two:
        size, device = 2, torch.device("cpu")

        def __init__(self, rank: int) -> None:
            self.rank = rank

    alone = MeanLoss(World(0, 1, torch.device("cpu")))
    assert math.isnan(alone.mean())
    for loss in (1.0, math.inf, 4.0, math.nan):
        alone.add(torch.tensor(loss))
    assert alone.mean() == 2.5
    assert alone.state() == [[5.0, 2.0]]
    assert MeanLoss(alone.world, [[5.0, 2.0], [1.0, 1.0]]).mean() == 2.0
    first, second = (MeanLoss(Two(rank), [[5.0, 2.0], [1.0, 1.0]]) for rank in (0, 1))
    assert (first._sums.tolist(), second._sums.tolist()) == ([5.0, 2.0], [1.0, 1.0])
    alone.start()
    alone.add(torch.tensor(3.0))
    assert alone.mean() == 3.0


def test_more_workers_are_advised_where_they_can_help(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    line = "20.0% of the training time was waiting for images"
    assert describe_waiting(0.2, 100.0, 4, "folder") == f"{line}; more data.workers may help: 4 for 8 usable cores"
    assert describe_waiting(0.2, 100.0, 8, "folder") == line
    assert describe_waiting(0.2, 100.0, 0, "digits") == line
    assert describe_waiting(0.2, 20.0, 4, "folder") == line
    assert describe_waiting(0.04, 100.0, 4, "folder") == line.replace("20", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert describe_waiting(0.2, 100.0, 2, "folder") == line


def test_the_console_says_how_long_images_were_waited_for(tmp_path, capsys):
    log = RunLog(tmp_path, 10, 0, tensorboard=False, is_main=True)
    log.step(1, 1, ROW | {"images_per_second": 8.0, "data_wait": 0.123})
    log.close()
    assert "8 images/s  data wait 12%" in capsys.readouterr().out
    assert "data wait 12%" in (tmp_path / "train.log").read_text()


@pytest.mark.slow
def test_the_report_says_how_long_images_were_waited_for(raw_config, tmp_path, capsys, monkeypatch):
    real, late = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: real() + late[0])

    def long_evaluation(*args):
        late[0] += 1e6
        return evaluate(*args)

    monkeypatch.setattr(trainer, "evaluate", long_evaluation)
    report = train(raw_config, tmp_path / "run")
    assert report["seconds"] > 1e6
    saved = torch.load(report["checkpoint"], weights_only=True)
    assert 0 < saved["time"]["waiting"] < saved["time"]["training"] < 1e6
    assert 1e-4 < report["data_wait"] < 1
    assert json.loads((tmp_path / "run" / "report.json").read_text())["data_wait"] == report["data_wait"]
    assert f"{report['data_wait']:.1%} of the training time was waiting" in capsys.readouterr().out
    again = train(raw_config, tmp_path / "run")  # a finished run, from what its checkpoint says
    assert again["data_wait"] == report["data_wait"]


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_picture_of_the_first_batch_leaves_it_as_it_was(
    raw_config, tmp_path, monkeypatch, channels_last, with_pictures
):
    """Mixup works in place: a batch that was mixed for the picture would be mixed twice in the step."""
    raw_config["train"]["channels_last"] = channels_last
    drawn = []

    class Drawn(Exception):
        pass

    def stop(run, window, *_):
        drawn.append(window[0].images)
        raise Drawn

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", stop)
        with pytest.raises(Drawn):
            train(raw_config, tmp_path / "with")
        patch.setattr(trainer, "draw_first_batch", lambda *_: None)
        with pytest.raises(Drawn):
            train(raw_config, tmp_path / "without")
    assert (drawn[0] == drawn[1]).all()


def test_rows_that_no_run_has_written_are_left_out(tmp_path):
    train_row = {"step": 1, "kind": "train", "loss": 1.0, "lr": 0.1}
    eval_row = {"step": 2, "kind": "eval", "epoch": 1, "loss": 1.0, "top1": 50.0}
    probe_row = {**eval_row, "step": 0, "epoch": 0}
    foreign = [
        "5", "{}", "null", "[" * 100_000, '"x"', "9" * 5000, json.dumps(train_row)[:-5], "NaN", "\x1b[31m",
        json.dumps({**train_row, "step": "1"}), json.dumps({**train_row, "loss": math.nan}),
        json.dumps({**eval_row, "epoch": 0}), json.dumps({**eval_row, "step": 0}), json.dumps({**train_row, "step": 0}),
        json.dumps({**train_row, "kind": "x"}), json.dumps({k: v for k, v in eval_row.items() if k != "top1"}),
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    own = [json.dumps(row) for row in (probe_row, train_row, eval_row)]
    path.write_bytes("\n".join([own[0], own[1], *foreign, own[2]]).encode() + b"\n\xff\xfe\0\n")
    assert read_metrics(path) == [probe_row, train_row, eval_row]


@pytest.mark.parametrize("where", ["its thread", "at the end", "at the start"])
def test_a_run_goes_on_without_tensorboard(tmp_path, monkeypatch, capfd, where):
    """Its thread finds the disk full and prints nothing of its own; `/dev/full` is a disk that always is."""
    folder, said, before = tmp_path / "tensorboard", [], threading.excepthook
    if where == "its thread":
        monkeypatch.setattr(event_file_writer, "RecordWriter", Full)
    elif where == "at the start":
        folder.write_bytes(b"")  # where a folder is to be
    board = TensorBoard(folder, 0, said.append)
    if where == "at the end":
        (events,) = folder.iterdir()
        (tmp_path / "full").symlink_to("/dev/full")
        os.replace(tmp_path / "full", events)  # in one go: the board's thread would make a file that is missing anew
    for step in range(1, 50):
        board.numbers(step, {"train/loss": 1.0})
    board.picture(1, "curves", np.zeros((2, 2, 3), np.uint8))
    board.close()
    assert threading.excepthook is before
    assert len(said) == 1
    assert said[0].endswith("the run goes on without TensorBoard")
    assert capfd.readouterr().err == ""


class Full(event_file_writer.RecordWriter):
    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
