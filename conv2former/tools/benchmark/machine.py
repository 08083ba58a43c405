"""What a machine is and can do: its description, and probes of its matrix products and its copying.

The probes are timed in the same rounds as the networks, so that a share of them is a ratio within one run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ... import _private
from ...ops.cpu import native, onednn

__all__ = [
    "OperatorTraffic",
    "command_line",
    "copy_probe",
    "describe_machine",
    "machine_lines",
    "matmul_probe",
    "native_precisions",
]

MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # far more than caches hold


def matmul_probe(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Returns a product of two square matrices to time, and its multiply-accumulates.

    It is one of float32 where a CPU has none of `dtype`: nothing of 16 bits is as fast there.
    """
    if device.type == "cpu" and not onednn.multiplies(dtype):
        dtype = torch.float32
    side = MATMUL_SIDE[device.type]
    a, b, out = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))

    def multiply() -> None:
        torch.mm(a, b, out=out)

    return multiply, side**3


def native_precisions(device: torch.device) -> list[str]:
    """Returns `fp32`, and `bf16` where a GPU is at work or the CPU has arithmetic for it."""
    return ["fp32", "bf16"] if device.type == "cuda" or onednn.multiplies(torch.bfloat16) else ["fp32"]


def copy_probe(device: torch.device) -> tuple[Callable[[], None], int]:
    """Returns a copy of a long array to time, and the bytes that it reads and writes together."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    return copy, 2 * source.numel()


class OperatorTraffic(_private.DispatchMode):
    """Counts the bytes that the operators of an eager step read and write, each tensor once per operator.

    Views move nothing. What an operator does inside (reordered copies, caches that save a reading) is not seen, so this
    is the traffic that the program asks for: less of it is what fusing operators gains. The functions of
    `ops/cpu/native.py`, which PyTorch does not know as operators, count as such.

    Attributes:
        bytes_moved: so far.
    """

    allows_fused = True  # else the blocks would run module by module, see models/fusion.py

    def __init__(self) -> None:
        super().__init__()
        self.bytes_moved = 0

    def __enter__(self) -> OperatorTraffic:
        native.watchers.append(self._count)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        native.watchers.remove(self._count)
        super().__exit__(*exception)

    def _count(self, arguments: Any) -> None:
        if isinstance(arguments, torch.Tensor):
            self.bytes_moved += _stored_bytes(arguments)
        elif isinstance(arguments, (tuple, list)):
            for each in arguments:
                self._count(each)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and adds the sizes of its inputs and outputs."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty", "aten::_unsafe_view")):
            self._count((args, list(kwargs.values()), out))
        return out


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Returns the bytes of a tensor's elements; expanded ones are read once."""
    if tensor.layout != torch.strided:  # such as oneDNN's packed weights
        return tensor.numel() * tensor.element_size()
    stored = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size]
    return torch.Size(stored).numel() * tensor.element_size()


def command_line() -> str:
    """Returns the command that started this program, as a user types it in the project's folder."""
    script = Path(sys.argv[0])
    return shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns what a reader needs to judge figures: processor, cores, threads, versions, load, settings."""
    packages = ("torch", "timm", "birder", "triton")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "cores_usable": cores,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
        "commit": _commit(),
        "compiled_functions": native.usable(torch.float32) if device.type == "cpu" else None,
        "bf16_arithmetic": onednn.multiplies(torch.bfloat16) if device.type == "cpu" else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        machine |= {
            "gpu": torch.cuda.get_device_name(device),
            "gpu_memory": torch.cuda.get_device_properties(device).total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    return machine


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """Returns the description for people."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    cores = f"{machine['cores_usable']} of {machine['cores']} cores usable"
    cpu = f"{machine['cpu']} ({machine['cpu_capability']}), {cores}"
    load = "" if machine["load_average"] is None else f", load average {machine['load_average']:.1f} at the start"
    lines = [f"{cpu}, {machine['threads']} threads{load}", f"Python {machine['python']}, {versions}"]
    if machine.get("commit"):
        lines.append(f"conv2former as of commit {machine['commit']}")
    if (compiled_functions := machine.get("compiled_functions")) is not None:
        lines.append(f"conv2former's compiled functions: {'yes' if compiled_functions else 'no'}")
    if machine.get("bf16_arithmetic") is False:
        lines.append("no bf16 arithmetic: PyTorch takes some ten times fp32's time, conv2former computes in fp32")
    if "gpu" in machine:
        tf32 = "with" if machine["cudnn_allow_tf32"] else "without"
        lines.insert(
            0,
            f"{machine['gpu']}, {machine['gpu_memory'] / 2**30:.0f} GiB, CUDA {machine['cuda']}, cuDNN "
            f"{machine['cudnn']}; fp32 convolutions {tf32} TF32, fp32 matrix products at precision "
            f"'{machine['float32_matmul_precision']}'",
        )
    return lines


def _commit() -> str | None:
    """Returns the commit of this project's working tree, with a mark if files differ from it; None outside of one."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=9", "HEAD") + (", and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or a tree of somebody else's
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
