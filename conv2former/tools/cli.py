"""What every script does with errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..errors import RunStopped, TrainingError, UserError

__all__ = ["run_cli"]


def run_cli(
    main: Callable[[], None],
    interrupted: str = "interrupted; nothing is left half-written",
    less_memory: str = "take smaller batches or smaller images",
) -> None:
    """Runs a script's main function and exits: 0, or the error's `exit_code`; 130 after Ctrl-C.

    Errors are one message on standard error, without a traceback, from one process where all have the same.

    Args:
        main: the script.
        interrupted: what to say after Ctrl-C.
        less_memory: what to do when memory runs out.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    try:
        main()
    except (UserError, TrainingError, RunStopped) as e:
        speaks = {"process": True, "node": local_rank == 0, "run": rank == 0}[e.scope]
        if speaks:
            prefix = "" if isinstance(e, RunStopped) else f"error on rank {rank}: " if rank else "error: "
            print(f"{prefix}{e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (RuntimeError, MemoryError) as e:
        if _out_of_memory(e):
            reason = (str(e) or type(e).__name__).splitlines()[0][:200]
            print(f"error on rank {rank}: out of memory; {less_memory} ({reason})", file=sys.stderr)
        elif _lost_contact(e):
            if local_rank == 0:
                print(f"error on rank {rank}: another process has ended; its message says why", file=sys.stderr)
        else:
            raise
        sys.exit(TrainingError.exit_code)


def _out_of_memory(error: Exception) -> bool:
    name = type(error).__name__  # not torch.OutOfMemoryError: it would import torch
    return name in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error)


def _lost_contact(error: Exception) -> bool:
    """Whether an error is what gloo or NCCL raises when another process has gone."""
    name, text = type(error).__name__, str(error)
    return name.startswith("Dist") or any(
        words in text for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")
    )
