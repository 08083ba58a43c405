from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch

from conv2former import CheckpointError
from conv2former.data import worker_errors
from conv2former.engine import checkpoint as module
from conv2former.engine.checkpoint import (
    check_best_and_last,
    latest_checkpoint,
    link_last,
    read_training_checkpoint,
    remove_leftovers,
    save_checkpoint,
    take_best,
)
from conv2former.errors import OutputError, TrainingError, WorkerError


def content(step: int) -> dict:
    return {
        "step": step, "epoch": 0, "model": {"w": torch.full((100,), float(step))}, "model_ema": None,
        "optimizer": {"state": {}, "param_groups": []}, "scaler": None, "best_metric": None, "class_names": ["a"],
        "config": {}, "variant": {}, "plan": {},
    }  # fmt: skip


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, content(step), is_best=step == 2, keep=2)
    assert names(tmp_path) == [
        "best.pt", "best.pt.sha256", "last.pt", "last.pt.sha256",
        "step_00000003.pt", "step_00000003.pt.sha256", "step_00000004.pt", "step_00000004.pt.sha256",
    ]  # fmt: skip
    assert read_training_checkpoint(tmp_path / "best.pt")["step"] == 2
    assert read_training_checkpoint(tmp_path / "last.pt")["step"] == 4
    assert (tmp_path / "last.pt").samefile(tmp_path / "step_00000004.pt")  # no second copy on the disk
    path, saved, warnings = latest_checkpoint(tmp_path)
    assert (path.name, saved["step"], warnings) == ("step_00000004.pt", 4, [])


def test_no_folder_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None


def test_a_damaged_newest_file_is_passed_over(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step), is_best=False, keep=5)
    newest = tmp_path / "step_00000002.pt"
    newest.write_bytes(newest.read_bytes()[:500])
    path, saved, warnings = latest_checkpoint(tmp_path)
    assert (path.name, saved["step"]) == ("step_00000001.pt", 1)
    assert len(warnings) == 1
    assert "step_00000002.pt" in warnings[0]
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint in"):
        latest_checkpoint(tmp_path)


def test_a_failed_write_leaves_everything_as_it_was(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, content(1), is_best=True, keep=1)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"step_00000002\.pt cannot be written .*No space left"):
        save_checkpoint(tmp_path, content(2), is_best=True, keep=1)
    assert names(tmp_path) == [
        "best.pt", "best.pt.sha256", "last.pt", "last.pt.sha256", "step_00000001.pt", "step_00000001.pt.sha256",
    ]  # fmt: skip
    assert latest_checkpoint(tmp_path)[1]["step"] == 1


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_any_flipped_bit_is_noticed(tmp_path, place):
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step), is_best=False, keep=5)
    newest = tmp_path / "step_00000002.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) * place // 100] ^= 1 << place % 8
    newest.write_bytes(data)
    path, _, warnings = latest_checkpoint(tmp_path)
    assert path.name == "step_00000001.pt"
    assert "step_00000002.pt does not match its checksum" in warnings[0]


def test_the_checksum_is_that_of_sha256sum(tmp_path):
    path = save_checkpoint(tmp_path, content(1), is_best=False, keep=1)
    result = subprocess.run(
        ["sha256sum", "--check", f"{path.name}.sha256"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout == f"{path.name}: OK\n"


def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path):
    """A limit on the file size fails as a full disk does, in the middle of torch's writing."""
    save_checkpoint(tmp_path, content(1), is_best=True, keep=1)
    big = content(2) | {"model": {"w": torch.zeros(300_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(OutputError, match=r"step_00000002\.pt cannot be written \(.*File too large") as error:
            save_checkpoint(tmp_path, big, is_best=True, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert names(tmp_path) == [
        "best.pt", "best.pt.sha256", "last.pt", "last.pt.sha256", "step_00000001.pt", "step_00000001.pt.sha256",
    ]  # fmt: skip
    assert latest_checkpoint(tmp_path)[1]["step"] == 1


def test_a_worker_that_is_killed_during_a_save_is_no_full_disk(tmp_path, monkeypatch):
    """PyTorch raises its error in a signal handler, wherever the program is."""
    save_checkpoint(tmp_path, content(1), is_best=True, keep=1)
    before = names(tmp_path)

    def killed(*args):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(WorkerError, match=r"a loader's worker process .* was killed"), worker_errors():
        save_checkpoint(tmp_path, content(2), is_best=True, keep=1)
    assert names(tmp_path) == before


def test_what_a_killed_process_leaves_does_not_count_and_is_removed(tmp_path):
    save_checkpoint(tmp_path, content(1), is_best=False, keep=1)
    for name in (".step_00000002.pt.123", ".best.pt.123", ".last.pt.123", "step_00000002.pt.sha256"):
        (tmp_path / name).write_bytes(b"half")
    assert latest_checkpoint(tmp_path)[1]["step"] == 1
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["last.pt", "last.pt.sha256", "step_00000001.pt", "step_00000001.pt.sha256"]


@pytest.mark.parametrize("moment", ["_write_whole", "best.pt", "last.pt", "step_00000002.pt"])
def test_a_kill_between_the_files_loses_nothing(tmp_path, monkeypatch, moment):
    """Checksum, best, last and newest are four names; whichever is missing, the folder can be gone on from."""
    save_checkpoint(tmp_path, content(1), is_best=True, keep=2)

    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "_write_whole":
            patch.setattr(module, moment, kill)
        else:
            real = os.replace
            patch.setattr(os, "replace", lambda a, b: kill() if str(b).endswith(moment) else real(a, b))
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, content(2), is_best=True, keep=2)
    assert latest_checkpoint(tmp_path)[1]["step"] == 1
    remove_leftovers(tmp_path)
    save_checkpoint(tmp_path, content(2), is_best=True, keep=2)
    assert latest_checkpoint(tmp_path)[1]["step"] == 2
    assert [read_training_checkpoint(tmp_path / name)["step"] for name in ("best.pt", "last.pt")] == [2, 2]


def test_a_file_system_without_hard_links_has_copies(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step), is_best=step == 1, keep=1)
    assert [read_training_checkpoint(tmp_path / name)["step"] for name in ("best.pt", "last.pt")] == [1, 2]


def test_a_run_of_before_there_was_a_last_file_gets_one(tmp_path):
    link_last(tmp_path / "none", 1)
    save_checkpoint(tmp_path, content(1), is_best=True, keep=1)
    (tmp_path / "last.pt").unlink()
    link_last(tmp_path, 1)
    assert read_training_checkpoint(tmp_path / "last.pt")["step"] == 1


SPOILED = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: (path.unlink(), path.touch()),
    "cut off": lambda path: (cut := path.read_bytes()[:500], path.unlink(), path.write_bytes(cut)),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("spoil", [spoil for key, spoil in SPOILED.items() if key != "a folder"])
@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_spoiled_best_or_last_file_is_noticed_and_made_anew(tmp_path, name, spoil):
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step), is_best=step == 1, keep=2)
    check_best_and_last(tmp_path)
    spoil(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*the same command looks"):
        check_best_and_last(tmp_path)
    link_last(tmp_path, 2)
    assert take_best(tmp_path, 1) == ""
    check_best_and_last(tmp_path)
    assert [read_training_checkpoint(tmp_path / name)["step"] for name in ("best.pt", "last.pt")] == [1, 2]


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_best_file_that_cannot_be_made_anew_is_put_aside(tmp_path, spoil):
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step), is_best=step == 1, keep=1)
    assert take_best(tmp_path, 1) == ""
    spoil(tmp_path / "best.pt")
    before = os.path.lexists(tmp_path / "best.pt")
    assert "best.pt" in take_best(tmp_path, 1)
    assert os.path.lexists(tmp_path / "best.pt.damaged") == before
    assert not [name for name in names(tmp_path) if name in ("best.pt", "best.pt.sha256")]


def test_a_best_file_that_a_server_does_not_give_now_is_left_alone(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, content(1), is_best=True, keep=1)
    monkeypatch.setattr(module, "_sha256_of", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(CheckpointError, match="I/O error"):
        take_best(tmp_path, 1)
    assert (tmp_path / "best.pt").exists()


@pytest.mark.parametrize(
    "plant",
    [
        os.mkfifo,
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere/a"),
        lambda path: path.write_bytes(b"\xff\0"),
    ],
    ids=["pipe", "folder", "dangling link", "bytes"],
)
def test_what_is_no_checksum_ends_in_a_sentence(tmp_path, plant):
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step), is_best=False, keep=5)
    checksum = tmp_path / "step_00000002.pt.sha256"
    checksum.unlink()
    plant(checksum)
    path, _, warnings = latest_checkpoint(tmp_path)
    assert (path.name, len(warnings)) == (("step_00000002.pt", 0) if checksum.is_symlink() else ("step_00000001.pt", 1))


def test_a_checksum_is_never_that_of_another_file(tmp_path, monkeypatch):
    """A kill between a file and its checksum leaves the file without one: it is not called damaged."""
    save_checkpoint(tmp_path, content(1), is_best=True, keep=1)
    write = module._write_whole

    def killed(path, text):
        if path.name == "best.pt.sha256":
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(module, "_write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, content(2), is_best=True, keep=1)
    check_best_and_last(tmp_path)
    assert read_training_checkpoint(tmp_path / "best.pt")["step"] == 2


@pytest.mark.slow
def test_saving_holds_no_second_copy_of_the_weights(tmp_path):
    """Measured as what the process takes at most while it saves 64 MiB of weights."""
    code = (
        "import resource, sys, torch, pathlib\n"
        "from conv2former.engine import checkpoint as c\n"
        "content = {'step': 1, 'model': {str(i): torch.ones(1 << 20) for i in range(16)}}\n"
        "c.save_checkpoint(pathlib.Path(sys.argv[1]) / 'warm', dict(content, model={}), False, 1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "c.save_checkpoint(pathlib.Path(sys.argv[1]), content, True, 1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 16 * 1024  # KiB: a quarter of the weights


def test_other_files_are_refused(tmp_path, official_file):
    with pytest.raises(CheckpointError, match=r"give it as model\.checkpoint"):
        read_training_checkpoint(official_file)
    path = save_checkpoint(tmp_path, content(1), is_best=False, keep=1)
    torch.save({**torch.load(path), "format": 99}, path)
    path.with_name(path.name + ".sha256").unlink()
    with pytest.raises(CheckpointError, match="format 99"):
        read_training_checkpoint(path)


WRONG = {
    "step": ["abc", -5, None, 1.5, True, 10**30],
    "model": [5, {}, {"w": 5}, {5: torch.zeros(1)}, None],
    "model_ema": [5, {"w": None}],
    "optimizer": [5, {}, {"state": 5, "param_groups": []}, {"state": {}, "param_groups": 5}],
    "scaler": [5, {5: 5}],
    "best_metric": ["x", float("nan"), [1]],
    "class_names": ["abc", [5], None, {"a": 1}],
    "config": [5, {"data": 5}, {5: {}}, None, {"data": {"root": torch.zeros(2)}}, {"data": {"root": [torch.zeros(2)]}}],
    "variant": [None, [1], {"dims": torch.zeros(2)}],
    "plan": [5, None, {"images": torch.zeros(2)}],
    "kernels": [5, {"network": 5}],
    "best_row": [5, {"epoch": "x"}, {5: 5}, {"epoch": 1e300}, {"loss": 1.0}],
    "confusion": [5, [[1], 2], [["x"]]],
    "per_class": [5, [[1]] * 3, [[1], [1], [1], [1, 2]], [[1.5]] * 4, [[-1]] * 4],
    "history": [5, [[1, 2]], [["x"] * 5]],
    "losses": [5, [["x", 1]]],
    "skipped": [5, {"training": 5}, {"training": {"a": 5}}],
    "seconds": ["x", float("inf")],
    "time": [5, {}, {"training": "x", "waiting": 1}],
    "format": ["x", -1],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_checkpoint_with_a_wrong_field_is_passed_over(tmp_path, key):
    save_checkpoint(tmp_path, content(1), is_best=False, keep=2)
    path = tmp_path / "step_00000002.pt"
    for value in WRONG[key]:
        torch.save({**content(2), key: value}, path)
        with pytest.raises(CheckpointError, match=f"{path} is damaged.*: {key} not as it is written") as error:
            read_training_checkpoint(path)
        assert "\n" not in str(error.value)
        found, _, warnings = latest_checkpoint(tmp_path)
        assert found.name == "step_00000001.pt"
        assert len(warnings) == 1


def test_a_flipped_bit_is_seen_without_the_checksum_beside_it(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step), is_best=True, keep=2)
    for name in ("best.pt", "step_00000002.pt"):
        path = tmp_path / name
        data = bytearray(path.read_bytes())
        data[data.index(torch.full((100,), 2.0).numpy().tobytes()) + 50] ^= 1
        path.unlink()  # not the other names of the same file
        path.write_bytes(data)
    (tmp_path / "step_00000002.pt.sha256").unlink()
    for name in ("best.pt", "step_00000002.pt"):
        with pytest.raises(CheckpointError, match="does not match its checksum"):
            read_training_checkpoint(tmp_path / name)
    assert latest_checkpoint(tmp_path)[0].name == "step_00000001.pt"


@pytest.mark.parametrize("where", ["model", "model_ema", "optimizer"])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, where):
    save_checkpoint(tmp_path, content(1), is_best=True, keep=2)
    bad = {"stem.norm1.running_var": torch.tensor([1.0, float("inf")])}
    changed = {"state": {0: {"exp_avg": bad["stem.norm1.running_var"]}}, "param_groups": []}
    changed = content(2) | {where: changed if where == "optimizer" else bad}
    name = "optimizer.state.0.exp_avg" if where == "optimizer" else f"{where}.stem.norm1.running_var"
    before = names(tmp_path)
    with pytest.raises(TrainingError, match=rf"after step 2 {name} has numbers that are not finite"):
        save_checkpoint(tmp_path, changed, is_best=True, keep=2)
    assert names(tmp_path) == before
    torch.save(changed, tmp_path / "step_00000002.pt")  # of a version that did
    assert latest_checkpoint(tmp_path)[0].name == "step_00000001.pt"


def test_a_pipe_and_a_folder_are_no_checkpoints(tmp_path):
    save_checkpoint(tmp_path, content(1), is_best=False, keep=2)
    os.mkfifo(tmp_path / "step_00000002.pt")
    (tmp_path / "step_00000003.pt").mkdir()
    found, _, warnings = latest_checkpoint(tmp_path)
    assert found.name == "step_00000001.pt"
    assert len(warnings) == 2
