"""The errors that a user can cause, and the ends of a run. Scripts print their text and exit with `exit_code`."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from .text import printable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "OutputError",
    "RunStopped",
    "TrainingError",
    "UserError",
    "WorkerError",
    "before_processes_meet",
    "bullets",
    "closest",
    "counted",
    "first_line",
    "is_lost_worker",
    "is_out_of_memory",
    "memory_for",
    "note_for_torchrun",
    "raise_mistakes",
    "shorten",
]


_M = TypeVar("_M", bound="_Message")
MAX_LINE = 10_000  # characters of a line of a message; names in files can be of any length


class _Message(Exception):
    """An error whose text is printed. Each argument is one line of it.

    A line end inside an argument is part of a name, and is escaped as all that `printable` escapes.
    """

    @property
    def lines(self) -> list[str]:
        """Its text, line by line, as it is printed."""
        texts = [printable(str(line)) for line in self.args]
        return [text if len(text) <= MAX_LINE else text[:MAX_LINE] + "..." for text in texts]

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def below(self: _M, where: object) -> _M:
        """Puts `where: ` before its first line, and returns it."""
        first, *others = self.args or ("",)
        self.args = (f"{where}: {first}", *others)
        return self


class UserError(_Message, ValueError):
    """A mistake in what the user gave: its text says what is wrong, where, and what to do.

    Args:
        *lines: of the text. A line end inside one of them is escaped: it can only come from a name in a file.

    Attributes:
        scope: which processes have the same error, so that it is printed once: this `process` alone, each on a `node`,
            or all of the `run`.
    """

    exit_code = 2
    scope = "process"


class ConfigError(UserError):
    """A wrong configuration: a YAML file, an override, or a variant definition."""

    scope = "run"


class DataError(UserError):
    """A data set that is missing, empty, or not what the configuration says."""


class CheckpointError(UserError, RuntimeError):
    """A weight file that cannot be read or does not fit. Also a RuntimeError, which is what torch and timm raise."""


class OutputError(UserError):
    """A run folder that cannot be written, for example because the disk is full."""


class WorkerError(UserError, RuntimeError):
    """A worker process that loads images was killed, most likely for want of memory, or cannot be started."""

    exit_code = 3


class TrainingError(_Message, RuntimeError):
    """A run that must not go on, such as one whose loss is not a number. The last checkpoint is as it was."""

    exit_code = 3
    scope = "run"


class RunStopped(_Message, RuntimeError):
    """A run that was told to stop by a signal. It is saved, and the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
    scope = "run"


def is_lost_worker(error: BaseException) -> bool:
    """Returns whether an error is PyTorch's of a loader's worker that has ended, or has no room for its results."""
    text = str(error)
    lacks_room = "in DataLoader worker process" in text and "shared memory" in text
    return isinstance(error, RuntimeError) and (text.startswith("DataLoader worker (pid") or lacks_room)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error is that memory has run out: Python's, or PyTorch's of a CPU or a GPU."""
    name = type(error).__name__  # not torch.OutOfMemoryError: it would import torch
    is_torchs = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return name in ("MemoryError", "OutOfMemoryError") or is_torchs


@contextlib.contextmanager
def memory_for(what: str, advice: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Says of an allocation that fails inside what it was for, since smaller batches are no help before the first one.

    Args:
        what: needs the memory.
        advice: what to do.
        kind: of the error.

    Raises:
        UserError: of that kind; memory has run out.
    """
    try:
        yield
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        reason = (str(e) or type(e).__name__).splitlines()[0][:200]
        raise kind(f"{what} needs more memory than there is ({reason}): {advice}") from None


@contextlib.contextmanager
def before_processes_meet() -> Iterator[None]:
    """Marks the mistakes inside as those that every process of a machine finds by itself, so that one says them."""
    try:
        yield
    except UserError as e:
        e.scope = "run" if e.scope == "run" else "node"
        raise


def note_for_torchrun(text: str, is_consequence: bool = False) -> None:
    """Leaves the end of this process for torchrun, if that has started it, to print at the end of its own report.

    Of several processes torchrun prints the text with the earliest whole second last, as the root cause.

    Args:
        text: one message, or a traceback.
        is_consequence: of the end of another process, which is then the root cause.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        note = {"message": text, "extraInfo": {"timestamp": str(int(time.time()) + is_consequence)}}
        with contextlib.suppress(OSError), open(path, "w") as file:  # the message itself has been printed
            json.dump({"message": note}, file)


def closest(word: object, choices: Iterable[str]) -> str:
    """Returns `` (did you mean 'x'?)`` for the choice nearest to `word`, or an empty string if none is near."""
    match = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f" (did you mean '{_cut(match[0])}'?)" if match else ""


def shorten(items: Iterable[object], limit: int = 20) -> str:
    """Joins `items` with commas, naming at most `limit` of them and counting the rest; huge names are cut."""
    texts = [_cut(str(item)) for item in items]
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f", and {rest} more" if rest > 0 else "")


def _cut(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def first_line(error: BaseException) -> str:
    """Returns the first line of what another library's error says, at most 200 letters; its type if that is nothing."""
    return next(iter(_cut(str(error).strip()).splitlines()), type(error).__name__)


def bullets(items: Iterable[str | UserError]) -> list[str]:
    """Returns one `- item` line for each; further lines of an error are indented below its first."""
    lines = []
    for item in items:
        first, *others = item.lines if isinstance(item, UserError) else [item]
        lines += [f"  - {first}", *(f"    {line}" for line in others)]
    return lines


def counted(number: int, singular: str, plural: str = "") -> str:
    """Returns `1 class`, `2 classes`: the plural is the singular and an s unless it is given."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def raise_mistakes(where: object, mistakes: Sequence[str | UserError], limit: int = 20) -> None:
    """Raises one ConfigError that lists the mistakes found in `where`, at most `limit`, if there are any."""
    if mistakes:
        more = f", the first {limit}" if len(mistakes) > limit else ""
        raise ConfigError(f"{where}: {counted(len(mistakes), 'mistake')}{more}:", *bullets(mistakes[:limit]))
