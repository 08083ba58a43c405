"""What every script does with errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..errors import ConfigError, TrainingError, UserError

__all__ = ["run_cli"]


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's main function and exits: 0, 2 for a mistake of the user's, 3 for a run that must not go on.

    Mistakes are one message on standard error, without a traceback. Those in the configuration are the same on every
    process of a torchrun, so only the first one prints them.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
    except (UserError, TrainingError) as e:
        # From a loader's worker the message comes with the worker's traceback in front.
        text = (
            str(e).rsplit("conv2former.errors.", 1)[-1].split(": ", 1)[-1] if "Original Traceback" in str(e) else str(e)
        )
        if rank == 0 or not isinstance(e, ConfigError):
            print(f"error: {text.strip()}" if rank == 0 else f"error on rank {rank}: {text.strip()}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 3)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
