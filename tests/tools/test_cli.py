"""What all commands do with errors."""

from __future__ import annotations

import multiprocessing
import os
import re
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from conv2former import compiling
from conv2former.errors import ConfigError, DataError, RunStopped, TrainingError
from conv2former.tools.cli import run_cli

from ..conftest import ROOT


def end(monkeypatch, capsys, folder, error: Exception, rank: int = 0) -> tuple[ProcessFailure, str]:
    """Returns what torchrun makes of a process that ends with an error, and what the process itself has printed."""

    def main() -> None:
        raise error

    file = folder / f"{rank}.json"
    for name, value in (("TORCHELASTIC_ERROR_FILE", file), ("RANK", rank), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(BaseException) as stop:  # noqa: PT011 - SystemExit, or the error itself
        run_cli(main)
    code = stop.value.code if isinstance(stop.value, SystemExit) else 1
    return ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(file)), capsys.readouterr().err


def report(*failures: ProcessFailure) -> list[str]:
    """Returns the lines of torchrun's report."""
    return str(ChildFailedError("scripts/train.py", {f.local_rank: f for f in failures})).rstrip("=\n").splitlines()


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (ConfigError("a.yaml: no such file"), 2, "error: a.yaml: no such file"),
        (DataError("a.png: not a readable image"), 2, "error on rank 1: a.png: not a readable image"),
        (TrainingError("the loss is not finite"), 3, "error: the loss is not finite"),
        (RunStopped("stopped by SIGTERM after step 3"), 75, "stopped by SIGTERM after step 3"),
        (MemoryError(), 3, "error on rank 1: out of memory; take smaller batches or smaller images (MemoryError)"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            3,
            "error on rank 1: a loader's worker process (pid 7) was killed, most likely by the system for want of "
            "memory: lower data.workers or the batch size, or give the container or the job more memory",
        ),
        (ZeroDivisionError("a fault of ours"), 1, "ZeroDivisionError: a fault of ours"),
    ],
)
def test_our_message_is_the_last_of_torchruns_report(tmp_path, monkeypatch, capsys, error, code, last):
    """Also if the process that speaks for all was ended before it could, or has only lost contact."""
    cause, _ = end(monkeypatch, capsys, tmp_path, error, 1)
    lost, said = end(monkeypatch, capsys, tmp_path, RuntimeError("Connection closed by peer"), 0)
    assert "another process has ended; its message says why" in said
    killed = ProcessFailure(local_rank=2, pid=1, exitcode=-15, error_file=str(tmp_path / "none"))
    assert (cause.exitcode, lost.exitcode) == (code, 3)
    last_line = report(lost, cause, killed)[-1]
    assert last_line.strip().removeprefix("traceback : ") == last


def test_a_message_of_several_lines_stays_one(tmp_path, monkeypatch, capsys):
    failure, said = end(monkeypatch, capsys, tmp_path, ConfigError("a.yaml: 2 mistakes:", "  - one", "  - two"))
    assert said == "error: a.yaml: 2 mistakes:\n  - one\n  - two\n"
    last = [line.strip() for line in report(failure)[-3:]]
    assert last == [
        "traceback : error: a.yaml: 2 mistakes:",
        "- one",
        "- two",
    ]


def test_where_no_note_can_be_left_the_message_is_printed(tmp_path, monkeypatch, capsys):
    _, said = end(monkeypatch, capsys, tmp_path / "missing", ConfigError("no"))
    assert said == "error: no\n"


@pytest.mark.parametrize("variable", [None, "TORCHELASTIC_RUN_ID", "WORLD_SIZE"])
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "\ninterrupted; the same command goes on\n"),
        (RunStopped("stopped by SIGTERM after step 3"), 75, "stopped by SIGTERM after step 3\n"),
        (
            RuntimeError("Connection closed by peer"),
            3,
            "error on rank 0: another process has ended; its message says why\n",
        ),
    ],
)
def test_one_of_several_processes_takes_nothing_apart(monkeypatch, capsys, variable, error, code, said):
    """Temporary files go and the loaders' workers end, but Python's own last work is left out."""
    done: list[object] = []

    def main():
        raise error

    def leave(code):
        done.append(code)
        raise SystemExit(code)

    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(compiling, "remove_temporary_folder", lambda: done.append("temporary files"))
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    with pytest.raises(SystemExit) as stop:
        run_cli(main, "interrupted; the same command goes on")
    ended = variable and worker.join(30) is None and not worker.is_alive()
    worker.kill()
    assert stop.value.code == code
    assert capsys.readouterr().err == said
    assert (done, bool(ended)) == ((["temporary files", code], True) if variable else ([], False))


def test_the_docs_start_one_device_with_python():
    """What torchrun prints is for several processes only: it stands below our message."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("**/*.yaml")]
    command = re.compile(r"^\W*(torchrun (?:.*\\\n)?.*scripts/.*)$", re.MULTILINE)
    found = [text for page in pages for text in command.findall(page.read_text())]
    assert len(found) > 20
    assert not [text for text in found if "--nproc-per-node=" not in text]
