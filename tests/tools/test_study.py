"""What studies share: several processes that train together. The trainings are played."""

from __future__ import annotations

import os
import signal

import pytest

from conv2former.config import check_config
from conv2former.errors import ConfigError, RunStopped, TrainingError
from experiments import study


class Processes:
    """In the place of RunProcesses: trainings that never end, or that end with codes at once."""

    def __init__(self, codes, during=lambda: None) -> None:
        self.exit_codes, self.during, self.done = codes, during, []

    def __call__(self, action, count, log, start):
        log.write_text("some line\nerror: data.root: missing\n  more of it\n")
        assert (len(self.exit_codes), start) == (count, "forkserver")
        return self

    @property
    def has_failed(self):
        return any(code not in (0, None) for code in self.exit_codes)

    def wait(self, seconds):
        if not self.done:
            self.during()
        return None not in self.exit_codes

    def stop(self):
        self.done.append("stop")
        self.exit_codes = [75, 75]

    def kill(self):
        self.done.append("kill")


def test_several_processes(tmp_path, monkeypatch):
    config = check_config({"data": {"root": "photos"}}, "test")

    def train_with(codes, during=lambda: None) -> list[str]:
        monkeypatch.setattr(study, "RunProcesses", processes := Processes(codes, during))
        try:
            study.train_quietly(config, tmp_path / "run", 2)
        finally:
            done.extend(processes.done)
        return processes.done

    done: list[str] = []
    train_with([0, 0])
    assert done == ["kill"]
    with pytest.raises(ConfigError, match=r"run: data.root: missing\n  more of it$"):
        train_with([2, None])
    with pytest.raises(TrainingError, match=r"run: data.root: missing"):
        train_with([3, 3])

    def interrupt():
        raise KeyboardInterrupt

    def end():
        os.kill(os.getpid(), signal.SIGTERM)

    done.clear()
    with pytest.raises(KeyboardInterrupt):
        train_with([None, None], interrupt)
    with pytest.raises(RunStopped, match="stopped by SIGTERM, and saved; the same command goes on"):
        train_with([None, None], end)
    assert done == ["stop", "kill"] * 2


def test_tables():
    assert study.table(["a", "b"], [["1", "2"]], True) == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert (study.with_deviation(1.25, None), study.with_deviation(1.0, 0.5, "+", 2)) == ("1.2", "+1.00 ± 0.50")
