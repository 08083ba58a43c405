"""What every script does with errors."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from ..errors import (
    RunStopped,
    TrainingError,
    UserError,
    WorkerError,
    first_line,
    is_lost_worker,
    is_out_of_memory,
    note_for_torchrun,
)
from ..printing import print_lines

__all__ = ["run_cli"]

# Packages that a script may lack, and the extra that brings them; with `train` those that most commands need.
EXTRAS = {
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "captum": "explain",
    **dict.fromkeys(("pydantic", "datasets", "pyarrow", "tensorboard", "matplotlib", "sklearn", "tqdm"), "train"),
    **dict.fromkeys(("torchvision", "PIL", "numpy"), "train"),
}

# What a shell says of `cat` or `grep` whose output nobody reads any more: 128 + SIGPIPE.
CUT = 141


def run_cli(
    main: Callable[[], None],
    interrupted: str = "interrupted; nothing is left half-written",
    less_memory: str = "take smaller batches or smaller images",
    extra: str = "train",
) -> None:
    """Runs a script's main function and exits: 0, or the error's `exit_code`; 130 after Ctrl-C, 141 without a reader.

    Errors are one message on standard error, without a traceback, from one process where all have the same. Under
    torchrun each process also leaves its message for torchrun's report.

    Args:
        main: the script.
        interrupted: what to say after Ctrl-C.
        less_memory: what to do when memory runs out.
        extra: the extra of this package that brings all that the script needs.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    mine = f"error on rank {rank}: "
    try:
        main()
    except (UserError, TrainingError, RunStopped) as e:
        speaks = {"process": True, "node": local_rank == 0, "run": rank == 0}[e.scope]
        prefix = "" if isinstance(e, RunStopped) else mine if rank and e.scope != "run" else "error: "
        _end(f"{prefix}{e}", e.exit_code, speaks)  # the lines of an error are printable
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        _leave(130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone: not all was printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CUT)
    except Exception as e:
        package = (e.name or "").partition(".")[0] if isinstance(e, ModuleNotFoundError) else ""
        if package in EXTRAS:
            needed = extra if EXTRAS[package] == "train" else EXTRAS[package]
            text = f'error: this needs {package}, which is not installed: pip install "conv2former[{needed}]"'
            _end(text, UserError.exit_code, rank == 0)
        if is_lost_worker(e):  # in code that does not expect it, since torch raises it in a signal handler
            from ..data.workers import why_lost

            _end(f"{mine if rank else 'error: '}{why_lost(e)}", WorkerError.exit_code)
        if is_out_of_memory(e):
            _end(f"{mine}out of memory; {less_memory} ({first_line(e)})", TrainingError.exit_code)
        if _lost_contact(e):
            text = f"{mine}another process has ended; its message says why"
            _end(text, TrainingError.exit_code, local_rank == 0, is_consequence=True)
        note_for_torchrun(traceback.format_exc().rstrip())
        raise


def _leave(code: int) -> NoReturn:
    """Exits; one of several processes without what Python does last, which is to take torch apart.

    That takes a second and more, and torchrun waits for it, and so do its processes for each other: one whose question
    is still on its way to another lets go of it only when that one has ended. And a thread that is inside of torch
    meanwhile, such as one of gloo's, aborts the process as it comes back to Python: the exit code is then 134.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    for worker in multiprocessing.active_children():
        worker.terminate()
    if compiling := sys.modules.get("conv2former.compiling"):
        compiling.remove_temporary_folder()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _end(text: str, code: int, speaks: bool = True, is_consequence: bool = False) -> NoReturn:
    """Exits with a message, which is printed if this is the process that `speaks`."""
    if speaks:
        print_lines(*text.split("\n"), file=sys.stderr)
    note_for_torchrun(text, is_consequence)
    _leave(code)


def _lost_contact(error: Exception) -> bool:
    """Whether an error is what gloo or NCCL raises when another process has gone."""
    name, text = type(error).__name__, str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")
    return isinstance(error, RuntimeError) and (name.startswith("Dist") or any(sign in text for sign in signs))
