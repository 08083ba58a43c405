"""compare-runs: what of two runs is the same. The runs are written by hand, as the trainer writes them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from conv2former.commands import console
from conv2former.config import Config
from conv2former.engine.checkpoint import save_checkpoint
from conv2former.tools.runs.comparing import compare_runs, differing_runs

from ..conftest import ROOT

pytestmark = pytest.mark.slow

METRICS = [
    {"step": 1, "kind": "train", "epoch": 1, "loss": 2.5, "lr": 0.1, "images_per_second": 7.0},
    {"step": 2, "kind": "train", "epoch": 1, "loss": 2.25, "lr": 0.1, "images_per_second": 8.0},
    {"step": 2, "kind": "eval", "epoch": 1, "loss": 2.0, "top1": 50.0, "n": 8},
]


def content() -> dict:
    torch.manual_seed(0)
    weights = {"fc.weight": torch.randn(3, 4), "fc.bias": torch.zeros(3)}
    return {
        "step": 2, "epoch": 1, "model": weights, "model_ema": copy.deepcopy(weights), "scaler": None,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "metric": 50.0, "best_metric": 50.0, "class_names": ["a"], "config": Config(data={"root": "x"}).to_dict(),
        "variant": {"name": "x"}, "plan": {}, "seconds": 1.0,
    }  # fmt: skip


def write_run(folder, saved: dict | None = None, rows: list[dict] | None = None) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or METRICS))
    save_checkpoint(folder / "checkpoints", saved or content(), is_best=True, keep=1)


@pytest.fixture
def runs(tmp_path):
    """Two equal runs, of which the second took longer, and a way to write the second anew."""
    a, b = tmp_path / "a", tmp_path / "b"
    write_run(a)

    def write(saved=None, rows=None):
        shutil.rmtree(b, ignore_errors=True)
        write_run(b, saved, rows)
        return a, b

    write({**content(), "seconds": 99.0}, [{**row, "images_per_second": 1.0} for row in METRICS])
    return a, b, write


def start(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", "compare-runs", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        console.run()
    return int(stop.value.code or 0)


def test_equal_runs(runs, monkeypatch, capsys):
    a, b, _ = runs
    assert start(monkeypatch, a, b) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"A: {a}", f"B: {b}"]
    table = [" ".join(line.split()) for line in lines[3:6]]
    assert table[1] == "metrics.jsonl 3 rows, 10 numbers none"
    # three names of one file are one comparison: 4 weights and averages, 1 state; step, epoch, scaler, 2 groups, 2 best
    assert table[2] == "step_00000002.pt, last.pt, best.pt 5 tensors, 7 other values none"
    assert lines[-1] == "the runs are identical, bit for bit"


def test_files_that_are_not_one(runs):
    a, b, _ = runs
    (b / "checkpoints" / "best.pt").unlink()
    save_checkpoint(b / "checkpoints", {**content(), "step": 4}, is_best=False, keep=2)
    parts = compare_runs(a, b)
    assert [(part.name, part.different) for part in parts[1:]] == [
        ("step_00000002.pt / step_00000004.pt, last.pt", 1),
        ("best.pt", 1),
    ]
    assert parts[1].first == "step: 2 in A, 4 in B, which differ by 2 (relative: 0.5)"
    assert parts[2].first == "only in A"


WEIGHT = torch.tensor([[1.0, -2.0], [0.0, 4.0]])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (WEIGHT, WEIGHT * torch.tensor([1.0, 1.5]), "2 of 4 numbers differ, by at most 2 (relative: 0.333)"),
        (WEIGHT, WEIGHT.double(), "float32 (2, 2) in A, float64 (2, 2) in B"),
        (WEIGHT, WEIGHT[:1], "float32 (2, 2) in A, float32 (1, 2) in B"),
        (torch.tensor(3), torch.tensor(4), "1 of 1 number differ, by at most 1 (relative: 0.25)"),
        (WEIGHT[:1, :1].as_strided((1, 1), (9, 9)), WEIGHT[1:, 1:], "1 of 1 number differ, by at most 3"),
        (WEIGHT.t(), WEIGHT, "2 of 4 numbers differ, by at most 2"),
        (WEIGHT.bfloat16(), WEIGHT.bfloat16() + 8, "4 of 4 numbers differ, by at most 8 (relative: 1.33)"),
    ],
)
def test_weights_that_differ(runs, first, second, expected):
    a, b, _ = runs
    for run, weight in ((a, first), (b, second)):
        shutil.rmtree(run)
        saved = content()
        saved["model"]["fc.weight"] = weight
        write_run(run, saved)
    (place,) = differing_runs(a, b)
    assert place.startswith(f"step_00000002.pt, last.pt, best.pt: model.fc.weight: {expected}")


def test_the_sign_of_zero_is_a_difference(runs):
    _, _, write = runs
    saved = content()
    saved["model_ema"]["fc.bias"][1] = -0.0
    (place,) = differing_runs(*write(saved))
    assert place.endswith("model_ema.fc.bias: 1 of 3 numbers differ, by at most 0 (relative: 0)")
    (place,) = differing_runs(*write(rows=[{**row, "lr": -0.0} if row["step"] == 1 else row for row in METRICS]))
    assert "step 1, train, lr: 0.1 in A, -0.0 in B" in place


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda saved: saved["optimizer"]["state"][0]["exp_avg"].mul_(3), "optimizer.state.0.exp_avg: 12 of 12"),
        (lambda saved: saved["optimizer"]["param_groups"][0].update(lr=0.2), "optimizer.param_groups.0.lr: 0.1 in A"),
        (lambda saved: saved["model"].pop("fc.bias"), "model.fc.bias: only in A"),
        (lambda saved: saved.update(model_ema=None), "model_ema.fc.weight: only in A"),
        (lambda saved: saved.update(best_metric=None), "best_metric: 50.0 in A, None in B"),
    ],
)
def test_states_that_differ(runs, change, expected):
    _, _, write = runs
    saved = content()
    change(saved)
    (place,) = differing_runs(*write(saved))
    assert expected in place


def test_losses_that_differ(runs, monkeypatch, capsys):
    a, b, write = runs
    rows = [{**row, "loss": row["loss"] * 2} if row["step"] == 2 else row for row in METRICS]
    write(rows=rows)
    assert start(monkeypatch, a, b) == 1
    out = capsys.readouterr().out
    assert "step 2, train, loss: 2.25 in A, 4.5 in B, which differ by 2.25 (relative: 0.5)" in out
    assert out.splitlines()[-1] == "the runs differ"
    write(rows=[METRICS[0], METRICS[2]])
    assert differing_runs(a, b) == ["metrics.jsonl: step 2, train, epoch: only in A"]
    assert compare_runs(a, b)[0].compared == "2 rows, 7 numbers"


def test_mistakes(runs, monkeypatch, capsys, tmp_path):
    a, b, _ = runs
    empty, logged = tmp_path / "empty", tmp_path / "logged"
    empty.mkdir()
    logged.mkdir()
    shutil.copy(a / "metrics.jsonl", logged)
    for words, expected in [
        ([a], "error: give two run folders, or --commits A B; these are 1: "),
        ([a, tmp_path / "none"], f"error: {tmp_path}/none: no such folder; give the folder of a run"),
        ([a, a], "are the same folder; give two runs"),
        ([a, empty], f"error: {empty}: no run, or one that has logged nothing yet"),
        ([a, logged], f"error: {logged} has no checkpoints yet"),
        ([a, b, "--config", "quickstart"], "error: --config: no effect without --commits A B"),
        ([a, b, "--output", "x"], "error: --output: no effect without --commits A B"),
    ]:
        assert start(monkeypatch, *words) == 2
        assert expected in capsys.readouterr().err
    (b / "checkpoints" / "best.pt").write_bytes(b"no checkpoint")  # the same file as the others
    assert start(monkeypatch, a, b) == 2
    assert "error: " in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- commits

# In the place of training: writes down how it was started, and fails or waits if it is told to.
TRAIN = """
import json, pathlib, sys, time, conv2former
words = sys.argv[1:]
run = pathlib.Path(words[words.index("--output") + 1])
run.mkdir()
loss = conv2former.LOSS
(run / "metrics.jsonl").write_text(json.dumps({"step": 1, "kind": "train", "loss": loss}) + "\\n")
(run / "words.json").write_text(json.dumps([sys.argv[0], conv2former.__file__, *words]))
if "fails=2" in words: print("error: fails: unknown key"); sys.exit(2)
if "fails=1" in words: raise ArithmeticError("in the middle")
if "waits=1" in words: time.sleep(60)
"""


def git(folder, *words: str) -> str:
    names = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", "-C", folder, *names, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository of three commits, of which the last computes another loss, and a working tree with a third one."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "clone"
    for name in ("scripts", "conv2former", "configs", "hooks"):
        (folder / name).mkdir(parents=True)
    (folder / "scripts" / "train.py").write_text(TRAIN)
    (folder / "configs" / "quickstart.yaml").write_text("")
    git(tmp_path, "init", "-q", str(folder))
    for text in ("LOSS = 1.0", "LOSS = 1.0  # in other words", "LOSS = 1.5"):
        (folder / "conv2former" / "__init__.py").write_text(text + "\n")
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", text)
    (folder / "conv2former" / "__init__.py").write_text("LOSS = 1.75\n")
    monkeypatch.chdir(folder / "scripts")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where another package of that name is
    monkeypatch.setattr("conv2former.commands.compare_runs.compare_runs", lambda *runs: compare_metrics(*runs))
    return folder


def compare_metrics(*runs):
    """As `compare_runs`, of runs to which the same checkpoint is given."""
    for run in runs:
        save_checkpoint(run / "checkpoints", content(), is_best=True, keep=1)
    return compare_runs(*runs)


def is_clean(clone) -> bool:
    return len(git(clone, "worktree", "list").splitlines()) == 1


def test_two_commits(clone, tmp_path, monkeypatch, capsys):
    assert start(monkeypatch, "--commits", "HEAD~2", "HEAD~1", "train.seed=3", "--output", tmp_path / "kept") == 0
    out = capsys.readouterr().out
    assert "LOSS = 1.0  # in other words\n" in out
    assert "identical, bit for bit" in out
    script, package, *words = json.loads((tmp_path / "kept" / "b" / "words.json").read_text())
    tree = os.path.dirname(os.path.dirname(script))
    assert package == f"{tree}/conv2former/__init__.py"
    assert not os.path.exists(tree)
    assert words[:2] == ["--config", f"{tree}/configs/quickstart.yaml"]  # of the commit
    assert words[-1] == "train.seed=3"
    assert "schedule.epochs=1" in words
    assert is_clean(clone)


def test_a_commit_and_the_working_tree(clone, monkeypatch, capsys):
    (clone / "mine.yaml").write_text("")
    assert start(monkeypatch, "--commits", "HEAD", ".", "--config", "../mine.yaml") == 1
    out = capsys.readouterr().out
    assert f"B: the working tree {clone}" in out
    assert "step 1, train, loss: 1.5 in A, 1.75 in B, which differ by 0.25 (relative: 0.143)" in out
    assert is_clean(clone)


def test_mistakes_with_commits(clone, tmp_path, monkeypatch, capsys):
    for words, code, expected in [
        (["HEAD", "none"], 2, f"error: none: no such commit in {clone}; give a hash, a branch, or '.'"),
        (["HEAD", ".", "fails=2"], 2, "ended with exit code 2; the end of its output:\nerror: fails: unknown key"),
        (["HEAD", ".", "fails=1"], 3, "ended with exit code 1; the end of its output:\nTraceback"),
    ]:
        assert start(monkeypatch, "--commits", *words) == code
        assert expected in capsys.readouterr().err
        assert is_clean(clone)
    monkeypatch.chdir(tmp_path)
    assert start(monkeypatch, "--commits", "HEAD", ".") == 2
    assert f"error: git rev-parse failed in {tmp_path}: " in capsys.readouterr().err
    git(tmp_path, "init", "-q")
    assert start(monkeypatch, "--commits", "HEAD", ".") == 2
    assert f"error: {tmp_path} is not a clone of this project" in capsys.readouterr().err


def test_ctrl_c_removes_the_trees(clone, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "compare_runs.py", "--commits", "HEAD", ".", "waits=1"]
    words = [*map(str, command), "--output", str(tmp_path / "kept")]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell lets what runs in the background ignore it, and so do the children of that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "kept" / "a" / "words.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert not is_clean(clone)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait() == 130
    assert "interrupted; the commits' folders are removed" in process.stderr.read()
    assert is_clean(clone)
