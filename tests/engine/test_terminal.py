"""What a command shows while it works."""

from __future__ import annotations

import io
import os

import pytest
from tqdm.utils import disp_len

from conv2former.engine import terminal
from conv2former.engine.logging import RunLog
from conv2former.engine.terminal import Bar, PlainProgress, bar, say

FIELDS = "loss 1.2345  lr 1.00e-03  430 images/s  data wait 2%"


def meter(columns: int, prefix: str, postfix: str | None, unit: str) -> str:
    return Bar.format_meter(1234, 50_000, 83.0, columns, prefix=prefix, postfix=postfix, unit=unit)


@pytest.mark.parametrize(
    ("prefix", "postfix", "unit"),
    [("epoch 12: ", FIELDS, "step"), ("best.pt", None, " images"), ("a_very_long_name_" * 9, None, " images")],
)
def test_twenty_columns_of_bar_remain(prefix, postfix, unit):
    for columns in (50, 60, 80, 100, 150, 300):
        text = meter(columns, prefix, postfix, unit)
        assert disp_len(text) == columns
        assert text.index("|", text.index("|") + 1) - text.index("|") - 1 >= 20, text
        assert "1234/50000" in text
        assert "2%|" in text


def test_the_least_important_fields_go_first():
    assert FIELDS in meter(300, "epoch 12: ", FIELDS, "step")
    text = meter(80, "epoch 12: ", FIELDS, "step")
    assert text.startswith("epoch 12:   2%|")
    assert "loss 1.2345]" in text
    assert " images/s]" in meter(80, "best.pt", None, " images")


def test_without_a_total():
    text = Bar.format_meter(1234, None, 83.0, 80, prefix="x: ", unit=" images")
    assert text.startswith("x: 1234 images [01:23, ")


@pytest.fixture
def time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
    return now


def test_plain_lines_every_ten_seconds_or_five_percent(time, capsys):
    progress = PlainProgress("best.pt", " images", 1000)
    for _ in range(10):
        time[0] += 4.0
        progress.update(40)
    assert capsys.readouterr().out.splitlines() == [
        "best.pt: 120 of 1,000 images (12 %), 10 images/s, 1:28 left",
        "best.pt: 240 of 1,000 images (24 %), 10 images/s, 1:16 left",
        "best.pt: 360 of 1,000 images (36 %), 10 images/s, 1:04 left",
    ]
    slow = PlainProgress("", " images", 1000)  # 5 % are 200 s, which are too long for silence
    for _ in range(100):
        time[0] += 4.0
        slow.update(1)
    assert [line.split(" of ")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(n) for n in range(15, 91, 15)
    ]


def test_a_bar_without_a_terminal_counts_what_the_items_stand_for(time, capsys, monkeypatch):
    def batches():
        for size in (50, 50, 20):
            time[0] += 11.0
            yield [0] * size

    assert len(list(bar(batches(), 120, " images", "x", count=len))) == 3
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()] == [
        "x: 50 of 120 images (42 %)", "x: 100 of 120 images (83 %)", "x: 120 of 120 images (100 %)",
    ]  # fmt: skip
    assert not err
    monkeypatch.setenv("RANK", "1")
    assert len(list(bar(batches(), 120, " images", "x", count=len))) == 3
    assert capsys.readouterr() == ("", "")


def test_training_without_a_terminal_says_how_far_it_is_between_its_rows(time, tmp_path, capsys):
    log = RunLog(tmp_path, 100, 0, tensorboard=False, is_main=True)
    for _ in range(10):
        time[0] += 6.0
        log.advance()
    log.close()
    assert capsys.readouterr().out.splitlines()[0].startswith("training: 5 of 100 steps (5 %), 0.17 steps/s, ")


def closed_pipe() -> io.TextIOWrapper:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_a_reader_that_has_gone():
    with closed_pipe() as file:
        say("one", file=file)
        say("two", file=file, required=True)  # it goes to nobody
    with closed_pipe() as file, pytest.raises(BrokenPipeError):
        say("one", file=file, required=True)


def test_training_goes_on_without_a_reader(tmp_path, monkeypatch):
    with closed_pipe() as file:
        monkeypatch.setattr("sys.stdout", file)
        log = RunLog(tmp_path, 10, 0, tensorboard=False, is_main=True)
        for _ in range(2):
            log.say("a line")
        log.close()
    assert (tmp_path / "train.log").read_text().count("a line") == 2


def test_clock():
    assert [terminal.clock(s) for s in (0, 83.9, 14706)] == ["0:00", "1:23", "4:05:06"]
