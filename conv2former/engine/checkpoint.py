"""Training checkpoints: one plain dict of tensors and built-in types per file, written whole or not at all.

Beside each file lies a `.sha256` in the format of the program `sha256sum`. A `step_NNNNNNNN.pt` that does not match it
is damaged, and the one before it is used.

step, epoch          optimizer steps done, epochs done
model, model_ema     state dicts of the raw module and of the average (None without one)
optimizer, scaler    state dicts (scaler None unless fp16)
metric, best_metric  the headline metric of these weights (None if not evaluated), top-1, and of the best so far
best_row             epoch and all metrics of the best so far, which checkpoint.metric chooses
losses               of each process, the sum and the number of the training losses since the last logged step
history              a row for every evaluation: epoch and the task's metrics; top1, loss, macro_f1, balanced_accuracy
class_names          names in index order; none where a task has no classes
skipped              of each split, the images that could not be read so far, and why, with `data.on_error: skip`
started_from         the checkpoint given with --resume PATH, or None
config, variant      the resolved configuration and the network's definition
kernels              what computed the first step: see kernels_used.py
seconds              training time so far
plan                 images, global batch and steps per epoch: a continuation must have the same
versions, format     of torch, timm and this package; of this layout

and what a task keeps of the best evaluation so far, for pictures and report (`Task.details`); classification:

per_class            rows of counts of every class (images, right by top-1 and top-5, answered)
confusion            rows of counts, a row per true class (None with many classes)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from .._store import to_disk
from ..errors import CheckpointError, OutputError, TrainingError, bullets, is_lost_worker, shorten
from ..tasks.registry import task_in
from ..weights.reading import read_checkpoint
from .saved import first_not_finite, wrong_fields

__all__ = [
    "FORMAT",
    "check_best_and_last",
    "latest_checkpoint",
    "link_last",
    "read_training_checkpoint",
    "remove_leftovers",
    "save_checkpoint",
    "take_best",
]

FORMAT = 2  # since 2 the configuration names the task; read are both
_NAME = re.compile(r"step_(\d{8})\.pt")
MOST_READ = 1000  # characters of a checksum's file
MAY_PASS = {errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT}  # of a disk or a server, not of a file


class _Hashed:
    """A file for writing that knows the hash of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, content: dict[str, Any], is_best: bool, keep: int, only_best: bool = False) -> Path:
    """Writes `folder/step_NNNNNNNN.pt`, `last.pt` and, if it is the best, `best.pt`; removes old step files.

    A file appears under its name only when it is complete and on the disk. Tensors are written one after the other, so
    that no second copy of the weights is held. The three names are one file on the disk, where it has hard links.

    Args:
        folder: made if it does not exist.
        content: the checkpoint; see the top of this module.
        is_best: whether its metric is the best of the run.
        keep: how many of the newest files stay.
        only_best: write `best.pt` alone, of weights that a run does not go on from.

    Returns:
        The path of the step's file.

    Raises:
        OutputError: the file cannot be written; the files before it are untouched.
        TrainingError: a tensor is not finite; nothing is written.
    """
    if name := first_not_finite(content):
        raise TrainingError(
            f"after step {content['step']} {name} has numbers that are not finite: nothing is saved, and earlier "
            "checkpoints are untouched. Lower optim.base_lr or set optim.clip_grad"
        )
    path = folder / _name(content["step"])
    temporary = folder / f".{path.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            hashed = _Hashed(file)
            torch.save({**content, "format": FORMAT}, cast(Any, hashed))
            _to_disk(file)
        sha256 = hashed.sha256.hexdigest()
        if only_best:
            _replace(temporary, folder / "best.pt", sha256)
            temporary.unlink()
            _to_disk(folder)
            return path
        _write_checksum(path, sha256)
        # before the rename: a kill between them is then made good by the repeated steps
        for name in ("best.pt", "last.pt") if is_best else ("last.pt",):
            _replace(temporary, folder / name, sha256)
        os.replace(temporary, path)
        _to_disk(folder)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        if is_lost_worker(e):  # torch says so wherever the program is
            raise
        raise OutputError(
            f"{path} cannot be written ({_reason(e)}); earlier checkpoints are untouched. Make room or repair the "
            "disk, then the same command goes on"
        ) from None
    for old in _list(folder)[:-keep]:
        old.unlink(missing_ok=True)
        _checksum_path(old).unlink(missing_ok=True)
    return path


def link_last(folder: Path, step: int) -> None:
    """Makes `last.pt` the checkpoint of the step that a run goes on from, unless they are one file already.

    It may have been damaged since, or be missing, as in runs of versions that wrote none.

    Args:
        folder: of the checkpoints; where it has none of that step, nothing is done.
        step: optimizer steps done.

    Raises:
        OutputError: it cannot be written.
    """
    last, source = folder / "last.pt", folder / _name(step)
    try:
        if source.is_file() and not (
            last.exists() and last.samefile(source) and _sha256_beside(last) == _sha256_beside(source)
        ):
            _replace(source, last, _sha256_of(source))
    except OSError as e:
        raise OutputError(f"{last} cannot be written ({e})") from None


def check_best_and_last(folder: Path) -> None:
    """Checks that `best.pt` and `last.pt` are as they were saved.

    Raises:
        CheckpointError: one is missing, damaged or cut off.
    """
    for path in (folder / "best.pt", folder / "last.pt"):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file any more; the same command looks for what can take its place")
        try:
            _verify(path)
        except CheckpointError as e:
            raise CheckpointError(f"{e}; the same command looks for what can take its place") from None


def take_best(folder: Path, step: int) -> str:
    """Looks whether `best.pt` is what a run has saved as its best so far, and makes it anew where that can be done.

    Args:
        folder: of the checkpoints.
        step: of the best so far; 0 for a linear probe, which no step file has.

    Returns:
        Nothing if it is there; else why those weights are lost. What was found in their place is then called
        `best.pt.damaged`.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: the file is there and cannot be read, for a reason that may pass.
    """
    best = folder / "best.pt"
    try:
        # a run that was killed while it saved a better one has that one, and comes to it again
        content = read_training_checkpoint(best)
        if content["step"] >= step and (step or content.get("best_row")):
            return ""
        why = f"{best} is that of another step"
    except CheckpointError as e:
        if getattr(e.__context__, "errno", None) in MAY_PASS or (best.is_file() and not os.access(best, os.R_OK)):
            raise
        why = str(e)
    source = folder / _name(step)
    try:
        if step and source.is_file() and not (best.exists() and best.samefile(source)):
            with contextlib.suppress(CheckpointError):
                read_training_checkpoint(source)
                _replace(source, best, _sha256_of(source))
                return ""
        if os.path.lexists(best):
            os.replace(best, best.with_name("best.pt.damaged"))
        _checksum_path(best).unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(f"{best} cannot be written ({e})") from None
    return why


def _reason(error: BaseException) -> str:
    """Returns what the operating system said, which torch reports as the cause of an error of its own."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__ or error
    return str(error).split("\n")[0]


def _to_disk(file: IO[Any] | Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    if not isinstance(file, Path):
        file.flush()
        os.fsync(file.fileno())
        return
    with contextlib.suppress(OSError):  # not every file system lets folders be flushed
        to_disk(file)


def _write_checksum(path: Path, sha256: str) -> None:
    _write_whole(_checksum_path(path), f"{sha256}  {path.name}\n")


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            _to_disk(file)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files of processes that were killed. Nobody else may be writing into the folder."""
    for path in folder.glob(".*.pt*"):
        path.unlink(missing_ok=True)
    for path in folder.glob("step_*.pt.sha256"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def _name(step: int) -> str:
    return f"step_{step:08d}.pt"


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _verify(path: Path) -> None:
    """Compares a file with the checksum beside it; one without is taken as it is.

    Raises:
        CheckpointError: they differ, or the file cannot be read.
    """
    try:
        expected = _sha256_beside(path)
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"{_checksum_path(path)} cannot be read") from None
    if expected is None:
        return
    try:
        found = _sha256_of(path)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e})") from None
    if found != expected:
        raise CheckpointError(f"{path} does not match its checksum: it is damaged or cut off")


def _sha256_beside(path: Path) -> str | None:
    """Returns the checksum that lies beside a file, None where there is none.

    Raises:
        OSError, UnicodeDecodeError: there is something else, such as a pipe, for which nobody waits here.
    """
    beside = _checksum_path(path)
    try:
        if not stat.S_ISREG(beside.stat().st_mode):
            raise OSError(f"{beside} is not a file")
        with beside.open() as file:
            return file.read(MOST_READ).split(" ")[0]
    except FileNotFoundError:
        return None


def _sha256_of(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe, to which nobody may ever write
        raise OSError("it is not a file")
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
    return sha256.hexdigest()


def _replace(source: Path, target: Path, sha256: str) -> None:
    """Gives a file another name, too, and a checksum under it.

    In between there is no checksum: one of another file would call a whole one damaged after a kill.
    """
    _checksum_path(target).unlink(missing_ok=True)
    _copy(source, target)
    _write_checksum(target, sha256)


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)  # no second copy on the disk
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _list(folder: Path) -> list[Path]:
    """Returns the complete step files, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name))


def _not_a_file(folder: Path) -> str:
    """Returns what to say about a folder that was given for a checkpoint to go on from."""
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    steps = _list(inside)
    if not steps:
        return f"{folder} is a folder without checkpoints; give the checkpoint to go on from"
    run = inside.parent if inside.name == "checkpoints" else inside
    return (
        f"{folder} is a folder; give the checkpoint to go on from: {steps[-1]}. To go on with that run itself, in its "
        f"own folder: --output {run} --resume auto"
    )


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a file that `save_checkpoint` wrote.

    Raises:
        CheckpointError: it is damaged, cannot be read, is not a training checkpoint of this project, or is of a newer
            format.
    """
    if path.is_dir():
        raise CheckpointError(_not_a_file(path))
    _verify(path)
    content = read_checkpoint(path)
    if not {"optimizer", "step"} <= content.keys():
        raise CheckpointError(f"{path} is a weight file, not a checkpoint to go on from; give it as model.checkpoint")
    version = content.get("format", 0)
    if type(version) is int and version > FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version reads up to {FORMAT}: update it")
    try:
        task = task_in(content)
    except CheckpointError as e:
        raise CheckpointError(f"{path} {e}") from None
    if wrong := wrong_fields(content, task):
        raise CheckpointError(
            f"{path} is damaged, or no checkpoint of this program: {shorten(wrong)} not as it is written here"
        )
    if name := first_not_finite(content):
        raise CheckpointError(f"{path} has numbers that are not finite, in {name}: a run cannot go on from it")
    return content


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Reads the newest checkpoint in `folder` that is intact.

    Returns:
        Its path, its content, and a warning for each newer file that is damaged; None if there is no file at all.

    Raises:
        CheckpointError: there are files and every one is damaged.
    """
    warnings: list[str] = []
    for path in reversed(_list(folder)):
        try:
            return path, read_training_checkpoint(path), warnings
        except CheckpointError as e:
            warnings.append(f"damaged checkpoint: {e}")
    if warnings:
        raise CheckpointError(f"every checkpoint in {folder} is damaged:", *bullets(warnings))
    return None
