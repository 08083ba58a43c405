"""What a measurement tells and saves while it runs: estimates, rows as they come, files that are not complete yet."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch

from conv2former.config import check_config
from conv2former.engine.images import fill_images
from conv2former.tools.benchmark import live as benchmark_live
from conv2former.tools.benchmark import progress as benchmark_progress
from conv2former.tools.benchmark.live import LiveOutput, Outputs, View
from conv2former.tools.benchmark.loop import Comparison, compare, compare_loop
from conv2former.tools.benchmark.models import measure
from conv2former.tools.benchmark.networks import parse_networks
from conv2former.tools.benchmark.progress import Forecast, Progress, duration
from conv2former.tools.benchmark.report import models_figure, models_foot, models_group, models_head, models_markdown
from conv2former.tools.benchmark.results import Baseline, Plan, Result
from conv2former.tools.benchmark.steps import Clock

from .test_benchmark_models import OURS, small_plan, small_probes  # noqa: F401 - a fixture

CPU = torch.device("cpu")
VIEW = View("models", models_head, models_group, models_foot, models_markdown, models_figure)


class Time:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_live(plan: Plan, outputs: Outputs):
    with Progress(ticking=False) as progress:
        live = LiveOutput(plan, VIEW, outputs, progress)
        report = measure(plan, Baseline(plan.networks[0].label), watcher=live)
        live.finish(report)
    return report


# ----------------------------------------------------------------------------------------------------------- progress


def test_lines_where_there_is_no_terminal(capsys):
    clock = Time()
    progress = Progress(ticking=False, clock=clock)
    progress.at("preparing a")
    clock.now = 4
    progress.at("preparing b", left=30)  # too soon for a line
    clock.now = 12
    progress.at("timing b")
    clock.now = 500
    progress.at("timing c", left=7200)
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "[0 s] preparing a",
        "[12 s, about 22 s left] timing b",
        "[8 min, about 2.0 h left] timing c",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 2

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(benchmark_progress, "bar_size", lambda: {"ncols": 100})
    clock = Time()
    with Progress(ticking=False, clock=clock) as progress:
        progress.at("timing a", left=30)
        clock.now = 10
        progress.at("timing b")
        progress.say("a row")
    assert "timing b:  33%|" in terminal.getvalue()
    assert "about 20 s left" in terminal.getvalue()
    assert "a row\n" in terminal.getvalue()


def test_something_long_is_told_of_again(monkeypatch, capsys):
    """Compiling takes minutes in which nothing ends: a thread repeats the line."""
    monkeypatch.setattr(benchmark_progress, "LINE_SECONDS", 0.0)
    progress = Progress()
    progress.at("compiling")
    while capsys.readouterr().err.count("compiling") < 1:
        pass
    while capsys.readouterr().err.count("compiling") < 1:
        pass
    progress.close()


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 99, 100, 5999, 6000)] == ["0 s", "99 s", "2 min", "100 min", "1.7 h"]


# ----------------------------------------------------------------------------------------------------------- forecast


def test_the_forecast_follows_the_arithmetic():
    """Two networks, the second with three times the arithmetic, in two modes; training counts three times."""
    plan = Plan(parse_networks(["test_vit", OURS]), CPU, modes=["inference", "training"], rounds=4, steps=2)
    macs = {"test_vit": 10, OURS: 30}

    def of_step(result: Result) -> float:
        return macs[result.network] * (3 if result.setting.mode == "training" else 1)

    forecast = Forecast(plan, of_step)
    assert forecast.left() is None
    (first, second), _ = ([Result(n.label, s) for n, s in members] for members in plan.groups())
    first.first_seconds = 1.0
    forecast.prepared(first, seconds=5.0)
    # 4 rounds of 2 steps of 1, 3, 3 and 9 s; the preparation of the last three is five steps long, as the first's was
    assert forecast.left() == pytest.approx(8 * (1 + 3 + 3 + 9) + 5 * (3 + 3 + 9))
    second.error = "out of memory"
    forecast.prepared(second, seconds=1.0)
    assert forecast.left() == pytest.approx(8 * (1 + 3 + 9) + 5 * (3 + 9))
    first.seconds = [2.0, 2.0]
    forecast.timed(first)
    assert forecast.left() == pytest.approx(2 * 2 * 2 + 8 * (6 + 18) + 5 / 2 * (6 + 18))


def test_a_timing_takes_its_time_however_short_a_step_is():
    plan = Plan(parse_networks(["test_vit"]), CPU, rounds=10)
    forecast = Forecast(plan, lambda result: None)
    (result,) = [Result(n.label, s, first_seconds=0.001) for members in plan.groups() for n, s in members]
    forecast.prepared(result, seconds=1.0)
    assert forecast.left() == pytest.approx(10 * 0.2)


# -------------------------------------------------------------------------------------------------- rows as they come


@pytest.mark.slow
def test_what_is_said_before_the_end(monkeypatch, capsys):
    """The plan first; then an estimate, first figures, a preliminary table; results alone on standard output."""
    monkeypatch.setattr(benchmark_live, "LONG_SECONDS", -1.0)
    run_live(small_plan("test_vit", OURS, modes=["training", "inference"], rounds=2), Outputs())
    out, err = capsys.readouterr()
    assert err.startswith(
        "measuring 2 networks in 2 settings (training, inference; fp32; 32 x 32; batch 2; nchw; eager), 2 rounds: "
        "8 timings; "
    )
    words = ["to go, judged by the first network", "test_vit, NCHW: about ", "preliminary, after round 1 of 2:"]
    places = [err.index(word) for word in words]
    assert places == sorted(places)
    assert err.count("MB held per image") == 2
    assert err.count("preliminary") == 2
    assert "preliminary" not in out
    assert out.count("\ntest_vit") == 2
    assert out.index("baseline test_vit") < out.index("Training step") < out.index("Inference")


@pytest.mark.slow
def test_files_are_written_as_results_come_and_marked_until_the_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark_live, "SAVE_SECONDS", 0.0)
    outputs = Outputs(tmp_path / "a.json", tmp_path / "a.png", tmp_path / "a.md")
    seen: list[tuple[bool, int, bool]] = []
    read = Clock.read

    def look(clock: Clock) -> float:
        content = json.loads(outputs.json_file.read_text())
        timings = sum(len(result["seconds"]) for group in content["groups"] for result in group["results"])
        seen.append((content["complete"], timings, "incomplete: written while" in outputs.markdown.read_text()))
        return read(clock)

    monkeypatch.setattr(Clock, "read", look)
    run_live(small_plan("test_vit", OURS, rounds=2), outputs)
    assert seen == [(False, 0, True), (False, 0, True), (False, 2, True), (False, 2, True)]
    assert json.loads(outputs.json_file.read_text())["complete"]
    assert "incomplete" not in outputs.markdown.read_text()
    assert outputs.chart.read_bytes().startswith(b"\x89PNG")
    assert "incomplete" not in capsys.readouterr().out


def test_what_was_measured_before_ctrl_c_is_shown_and_saved(monkeypatch, tmp_path, capsys):
    timings = iter([1.0, 2.0, KeyboardInterrupt()])

    def read(clock: Clock) -> float:
        value = next(timings)
        if isinstance(value, BaseException):
            raise value
        return value

    monkeypatch.setattr(Clock, "read", read)
    outputs = Outputs(json_file=tmp_path / "a.json", markdown=tmp_path / "a.md")
    report = run_live(small_plan("test_vit", OURS, rounds=5), outputs)
    assert report.interrupted
    content = json.loads(outputs.json_file.read_text())
    assert (content["complete"], content["interrupted"]) == (False, True)
    assert [result["seconds"] for result in content["groups"][0]["results"]] == [[1.0], [2.0]]
    assert "interrupted: some rounds are missing" in outputs.markdown.read_text()
    out = capsys.readouterr().out
    assert "\ntest_vit" in out
    assert "interrupted: some rounds are missing" in out


def test_a_full_disk_does_not_end_the_measurement(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "results"
    outputs = Outputs(json_file=folder / "a.json")
    outputs.check()
    real = LiveOutput.group_ended

    def without_a_folder(self, group) -> None:
        shutil.rmtree(folder)
        folder.write_text("in the way")
        real(self, group)
        folder.unlink()

    monkeypatch.setattr(LiveOutput, "group_ended", without_a_folder)
    run_live(small_plan("test_vit", rounds=1), outputs)
    assert capsys.readouterr().err.count("not saved for now: ") == 1
    assert json.loads((folder / "a.json").read_text())["complete"]


# -------------------------------------------------------------------------------------------------- two ways in turns


def test_a_comparison_tells_its_rounds_and_keeps_them_after_ctrl_c(capsys):
    calls = []

    def second() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    clock = Time()
    with Progress(ticking=False, clock=clock) as progress:
        result = compare(lambda: setattr(clock, "now", clock.now + 6), second, 5, CPU, progress, "two loops")
    assert result.interrupted
    assert len(result.ratios) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[0 s] two loops: a first round, which does not count"
    assert lines[1].startswith("two loops: about ")
    assert lines[1].endswith(" for 5 rounds")
    assert "round 2 of 5, ratio so far" in lines[2]
    assert ", interrupted)" in result.describe("a", "b", 1, "step")[-1]

    def at_once() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # nothing to keep
        compare(lambda: None, at_once, 5, CPU)


def test_one_round_has_no_quartiles():
    assert Comparison([1.0], [2.0]).describe("a", "b", 1, "step")[-1] == (
        "ratio 2.000 (middle half of 1 round: 2.000 to 2.000)"
    )


def test_the_training_loop_beside_a_bare_one():
    shape = {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "kernel_size": 3}
    raw = {
        "model": {"variant": {"name": "conv2former_loop", **shape}, "fused": False},
        "data": {"root": "unused", "num_classes": 2, "img_size": 32},
        "train": {"batch_size": 2, "precision": "fp32"},
        "log": {"tensorboard": False},
    }
    config = fill_images(check_config(raw, "test"))
    title, *lines = compare_loop(config, steps=2, rounds=2)
    assert title == "conv2former_t, batch 2, 32 x 32, fp32, cpu"
    assert [line.split(":")[0] for line in lines[:2]] == ["bare loop", "training loop"]
    assert lines[2].startswith("ratio ")
