"""How much memory is free: the least of what the machine and the control groups around a process leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from conv2former.memory import free_memory

MACHINE = {"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable:      500 kB\n"}
STATISTICS = "cache 5\ninactive_file 1000\ntotal_inactive_file 2000\n"


def group(folder: str, version: int, limit: object, used: int) -> dict[str, str]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    return {
        f"{folder}/{names[0]}": f"{limit}\n",
        f"{folder}/{names[1]}": f"{used}\n",
        f"{folder}/memory.stat": STATISTICS,
    }


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
IN_V1 = {"proc/self/cgroup": "5:cpu,memory:/outside/job\n0::/\n"}
IN_V2 = {"proc/self/cgroup": "0::/slice/job\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MACHINE, 512_000),
        (MACHINE | IN_V2, 512_000),
        (MACHINE | IN_V2 | group(f"{V2}/slice/job", 2, 100_000, 60_000), 41_000),
        (MACHINE | IN_V2 | group(f"{V2}/slice/job", 2, "max", 60_000), 512_000),
        (MACHINE | IN_V2 | group(f"{V2}/slice/job", 2, "max", 1) | group(f"{V2}/slice", 2, 50_000, 45_000), 6_000),
        (MACHINE | {"proc/self/cgroup": "0::/\n"} | group(V2, 2, 100_000, 60_000), 41_000),
        (MACHINE | IN_V1 | group(f"{V1}/outside/job", 1, 100_000, 60_000), 42_000),
        (MACHINE | IN_V1 | group(V1, 1, 100_000, 60_000), 42_000),  # in a container
        (MACHINE | IN_V1 | group(V1, 1, 2**63 - 4096, 60_000), 512_000),
        (IN_V2 | group(V2, 2, 100_000, 150_000), 0),
    ],
)  # fmt: skip
def test_the_least_that_is_left(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_memory(tmp_path) == expected


def test_of_this_machine():
    if Path("/proc/meminfo").exists():
        assert (free_memory() or 0) > 1e6
