"""How much main memory is free for this process: of the machine, and of the container or job that it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["free_memory"]

# of each version of control groups: where they are, the files of the limit and of what is used, and the line of
# memory.stat with what the system gives back by itself: files that were read some time ago
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("", "memory.max", "memory.current", "inactive_file")


def free_memory(root: Path = Path("/")) -> int | None:
    """Returns the bytes of main memory that are free for this process, or None where the system does not tell.

    Args:
        root: of the file system.
    """
    return min([*_of_machine(root), *_of_groups(root)], default=None)


def _of_machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable"):
            yield 1024 * int(line.split()[1])


def _of_groups(root: Path) -> Iterator[int]:
    """Goes over what is left in this process's control group and in those around it, which have limits of their own."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, name = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        folder, limit_name, used_name, idle_name = _V2 if number == "0" else _V1
        base = root / "sys/fs/cgroup" / folder
        place = base / name.lstrip("/")
        # in a container the name may be that of a group outside; its own group is then the base
        for group in dict.fromkeys((place, *place.parents[: len(Path(name).parts) - 1], base)):
            limit, used = (_number(group / file) for file in (limit_name, used_name))
            if limit is not None and used is not None:
                idle = [
                    int(line.split()[1]) for line in _lines(group / "memory.stat") if line.split()[:1] == [idle_name]
                ]
                yield max(0, limit - used + sum(idle))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Returns the number in a file; None if there is none, as where the limit is called max."""
    text = " ".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None
