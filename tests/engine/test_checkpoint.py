from __future__ import annotations

import errno
import os

import pytest
import torch

from conv2former import CheckpointError
from conv2former.engine import checkpoint as module
from conv2former.engine.checkpoint import latest_checkpoint, read_training_checkpoint, save_checkpoint


def content(step: int) -> dict:
    keys = module._KEYS - {"step"}
    return {"step": step, **dict.fromkeys(keys), "model": {"w": torch.full((100,), float(step))}}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, content(step), is_best=step == 2, keep=2)
    assert names(tmp_path) == ["best.pt", "step_00000003.pt", "step_00000004.pt"]
    assert read_training_checkpoint(tmp_path / "best.pt")["step"] == 2
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
    with pytest.raises(CheckpointError, match=r"step_00000002\.pt cannot be written .*No space left"):
        save_checkpoint(tmp_path, content(2), is_best=True, keep=1)
    assert names(tmp_path) == ["best.pt", "step_00000001.pt"]
    assert latest_checkpoint(tmp_path)[1]["step"] == 1


def test_a_half_written_file_does_not_count(tmp_path):
    """What a kill in the middle of a write leaves behind."""
    save_checkpoint(tmp_path, content(1), is_best=False, keep=1)
    (tmp_path / ".step_00000002.pt.123").write_bytes(b"half")
    assert latest_checkpoint(tmp_path)[1]["step"] == 1


def test_other_files_are_refused(tmp_path, official_file):
    with pytest.raises(CheckpointError, match=r"give it as model\.checkpoint"):
        read_training_checkpoint(official_file)
    path = save_checkpoint(tmp_path, content(1), is_best=False, keep=1)
    torch.save({**torch.load(path), "format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99"):
        read_training_checkpoint(path)
