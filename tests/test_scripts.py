"""The scripts as a user starts them, several processes included."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from conv2former.commands.train import summary
from conv2former.config import load_config
from conv2former.engine import train
from conv2former.tools.checkpoints.table import variants_table
from conv2former.tools.runs.comparing import differing_runs
from conv2former.tools.runs.killing import RunProcesses

from .conftest import ROOT, TINY_YAML
from .engine.conftest import small_data  # noqa: F401 - a fixture
from .engine.test_trainer import final

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def command(*words) -> list[str]:
    return [str(word) for word in words]


def run(*words, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    result = subprocess.run(command(*words), capture_output=True, text=True, cwd=ROOT, timeout=280, **kwargs)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def script(name: str, *words, **kwargs) -> subprocess.CompletedProcess:
    return run(sys.executable, ROOT / "scripts" / name, *words, **kwargs)


def accuracy(text: str) -> tuple[str, int]:
    """Returns the top-1 accuracy, as printed, and the number of images."""
    match = re.search(r"^\S+ +checkpoint +([\d.]+)(?: +[\d.]+){5} +(\d+) +[\d,]+$", text, re.MULTILINE)
    assert match, text
    return match[1], int(match[2])


def test_quickstart(tmp_path):
    """The README's first command: at least 98 % on the 360 held-out digits, and everything it promises is there.

    Half of its epochs are enough for that.
    """
    result = run(
        *TORCHRUN, "--nproc-per-node=2", "scripts/train.py", "--config", "configs/quickstart.yaml",
        "--output", tmp_path / "run", f"data.root={tmp_path}/digits", "schedule.epochs=15",
    )  # fmt: skip
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["top1"] >= 98.0
    assert report["n"] == 360
    assert f"top-1 {report['top1']:.2f} % on 360 images" in result.stdout
    for label, path in (("checkpoint", report["checkpoint"]), ("TensorBoard", report["tensorboard"])):
        assert re.search(rf"{label} +{re.escape(path)}\n", result.stdout)
        assert os.path.exists(path)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert "Warning" not in result.stderr
    assert result.stdout.count("of the training time was waiting for images\n") == 1  # without a hint: no workers
    following = re.search(r"next: \S*python\S* (scripts/validate\.py --checkpoint .*)", result.stdout)[1].split()
    alone = run(sys.executable, *following).stdout
    assert accuracy(alone) == (f"{report['top1']:.2f}", 360)


@pytest.fixture
def config_file(small_data, tmp_path):  # noqa: F811
    (tmp_path / "conv2former_test.yaml").write_text(TINY_YAML + "ls_init_value: 0.5\n")
    raw = {
        "model": {"variant": "conv2former_test.yaml", "drop_path_rate": 0.2},
        "data": {"source": "hf", "root": str(small_data), "img_size": 32, "workers": 0},
        "schedule": {"epochs": 6, "warmup_epochs": 1, "cooldown_epochs": 0},
        "train": {"batch_size": 4, "accum_steps": 2},
        "ema": {"decay": 0.9},
        "log": {"every_steps": 1, "tensorboard": False},
        "checkpoint": {"every_steps": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def start(*words, log) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(command(*words), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def checkpoints(folder) -> int:
    return len(list(folder.glob("checkpoints/step_*.pt")))


def test_torchrun(config_file, tmp_path):
    """Two processes under two agents, as on two machines, of which one is killed and both are restarted by torchrun."""
    config = load_config(config_file)
    whole = RunProcesses(lambda: train(config, tmp_path / "whole"), 2, tmp_path / "whole.txt")
    assert whole.wait(120), (tmp_path / "whole.txt").read_text()
    assert not whole.has_failed, (tmp_path / "whole.txt").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    agent = [*TORCHRUN[:-1], "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    words = [f"--rdzv-endpoint={endpoint}", "scripts/train.py", "--config", config_file, "--output", tmp_path / "run"]
    logs = [tmp_path / f"agent{i}.txt" for i in range(2)]
    agents = [start(*agent, *words, log=log) for log in logs]
    deadline = time.monotonic() + 120
    while not checkpoints(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks = subprocess.run(["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    codes = [process.wait(120) for process in agents]
    output = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], output
    assert "going on from " in output
    assert not differing_runs(tmp_path / "whole", tmp_path / "run")


def test_sigterm_to_torchrun(config_file, tmp_path):
    words = [*TORCHRUN, "--nproc-per-node=2", "scripts/train.py", "--config", config_file, "schedule.epochs=500"]
    process = start(*words, "--output", tmp_path / "run", log=tmp_path / "log.txt")
    deadline = time.monotonic() + 120
    while checkpoints(tmp_path / "run") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    stopped = re.search(r"stopped by SIGTERM after step (\d+) of 1000, and saved", (tmp_path / "log.txt").read_text())
    assert stopped, (tmp_path / "log.txt").read_text()
    assert final(tmp_path / "run")["step"] == int(stopped[1])


MISTAKES = [
    (["--config", "none.yaml"], "error: none.yaml: no such file"),
    (["--config", "configs/quickstart.yaml", "train.sede=1"], "train.sede: unknown key (did you mean 'seed'?)"),
    (["--config", "configs/imagenet1k/conv2former_t.yaml", "data.root=/none"], "error: /none: no such folder"),
    (["--config", "configs/quickstart.yaml", "model.checkpoint=none.pt"], "error: none.pt: no such file"),
    (["--config", "configs/quickstart.yaml", "surplus"], "error: 'surplus': expected key=value"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_mistakes_end_with_one_message(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("scripts/train.py", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.count(expected) == 1
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_in_a_worker_is_one_message(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                (tmp_path / "data" / split / name / f"{i}.png").write_bytes(b"no picture")
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    result = script(
        "train.py", "--config", "configs/imagenet1k/_base.yaml", "--output", tmp_path / "run",
        f"data.root={tmp_path}/data", f"model.variant={tmp_path}/tiny.yaml",
        "data.num_classes=2", "data.workers=1", "train.batch_size=2", check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert re.search(r"error: \S+\.png: not a readable image", result.stderr)
    assert "Traceback" not in result.stderr


def test_print_config(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--config", "configs/quickstart.yaml", "--print-config", "train.seed=3"]
    )
    runpy.run_path("scripts/train.py", run_name="__main__")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["train"]["seed"] == 3
    assert printed["model"]["variant"]["name"] == "conv2former_digits"


def test_the_readme_has_the_table_that_the_script_prints():
    names = [
        line.split("`")[1]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("| `conv2former_")
    ]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "configs" / "models").glob("*.yaml"))
    assert variants_table(names) in (ROOT / "README.md").read_text()


def test_the_last_lines_of_a_run_can_be_copied(tmp_path):
    """A path with a blank is quoted, a small split says how coarse it is."""
    folder = tmp_path / "my run"
    report = {
        "task": "classification", "top1": 50.0, "n": 48, "last_top1": 45.83, "weights": "raw",
        "epoch": 8, "epochs": 26, "seconds": 61.0,
        "skipped": 0, "checkpoint": f"{folder}/checkpoints/best.pt", "last_checkpoint": f"{folder}/checkpoints/last.pt",
        "tensorboard": None, "curves": "curves.png", "confusion": None, "stopped_early": "", "classes": [],
    }  # fmt: skip
    lines = summary(report, folder)
    assert shlex.split(lines[-1])[-2:] == ["--checkpoint", report["checkpoint"]]
    assert "validate" in lines[-1]
    assert "  precision    one of 48 images is 2.08 points of top-1, whose standard error is 7.22 points" in lines
    assert f"  last epoch   {report['last_checkpoint']} (top-1 45.83 %)" in lines
    assert not any("precision" in line for line in summary(report | {"n": 500}, folder))
