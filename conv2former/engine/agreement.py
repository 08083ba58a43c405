"""What the processes of a run check between them before it starts: that they found the same, and the best weights."""

from __future__ import annotations

import hashlib

from ..config import differences
from ..errors import ConfigError, bullets
from .checkpoint import latest_checkpoint, link_last, take_best
from .distributed import World
from .prepare import Job
from .saved import forget_best

__all__ = ["check_agreement", "check_best"]


def check_agreement(job: Job, world: World) -> None:
    """Checks that all processes have found the same data and the same checkpoint on their machines.

    Raises:
        ConfigError: what differs, and on which process.
    """
    steps = world.gather(job.saved["step"] if job.saved else None)
    if steps[world.rank] != steps[0]:
        # The processes of a run that was just killed may have written after this one looked. The main process looked
        # when it had the folder for itself, so by now there is nothing newer.
        found = latest_checkpoint(job.output / "checkpoints")
        job.saved = found[1] if found else None
    config = job.config.to_dict()
    del config["data"]["root"]  # may be another path on another machine
    mine = {
        "configuration": config,
        "training images": len(job.train_source),
        "validation images": len(job.val_source),
        "classes": hashlib.sha256("\n".join(job.class_names).encode()).hexdigest(),
        "checkpoint to go on from": job.saved["step"] if job.saved else None,
    }
    first, *others = world.gather(mine)
    for rank, theirs in enumerate(others, 1):
        if changed := differences(first, theirs):
            raise ConfigError(f"rank {rank} has found something else than rank 0:", *bullets(changed))


def check_best(job: Job, world: World) -> None:
    """Looks whether the best weights so far are still there, and makes `last.pt` the checkpoint to go on from.

    Where the best are lost, the run goes on as one that has none yet, and a note says so.

    Raises:
        UserError: the files cannot be read or written.
    """
    saved, folder = job.saved, job.output / "checkpoints"
    lost: list[str] = []

    def look() -> None:
        assert saved is not None
        link_last(folder, saved["step"])
        if saved.get("best_row"):
            lost.append(take_best(folder, saved["best_row"]["epoch"] * saved["plan"]["steps_per_epoch"]))

    if saved is None:
        return
    world.on_main(look)
    why = next(filter(None, world.gather("".join(lost))), "")
    if not why:
        return
    row = saved["best_row"]
    job.notes.insert(
        0,
        f"warning: {why}. The best weights so far, of epoch {row['epoch']}, are lost: the best from here on take their "
        f"place, and {folder / 'last.pt'} has the last ones",
    )
    forget_best(saved)
