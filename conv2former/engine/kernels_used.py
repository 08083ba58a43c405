"""With what a run computes, since the same step by other kernels differs by rounding."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .. import compiling
from ..config import BaseConfig
from ..data import pixels
from ..ops.backends import supports_operators
from ..ops.cpu import native
from ..tasks.network import compiled_parts

__all__ = ["changed_kernels", "kernels_used"]


def kernels_used(config: BaseConfig, device: torch.device) -> dict[str, str]:
    """Returns what computes the network and prepares the images of a run, and PyTorch's version: texts by their names.

    What has to be compiled for it is compiled now.
    """
    backend = _network(device) if config.model.fused else "PyTorch, module by module"
    return {
        "network": f"{backend}, {compiled_parts(config)} through torch.compile" if config.train.compile else backend,
        "images": compiling.describe(pixels.SOURCE, *pixels.FLAGS) or "Pillow",
        "torch": str(torch.__version__),
    }


def _network(device: torch.device) -> str:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return compiling.describe(native.SOURCE) or f"PyTorch's operators for {capability}"
    name = torch.cuda.get_device_name(device)
    x = torch.empty(1, 8, 2, 2, device=device).contiguous(memory_format=torch.channels_last)
    if not supports_operators(x, 1):
        return f"PyTorch's operators on {name}"
    import triton  # whose version `supports_operators` has looked at

    return f"Triton {triton.__version__} on {name}"


def changed_kernels(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Returns a line on what a run goes on with that it did not begin with, '' where there is nothing."""
    changes = [f"{name}: {before[name]} -> {text}" for name, text in now.items() if before.get(name, text) != text]
    if not changes:
        return ""
    return (
        f"warning: this run began with other kernels ({'; '.join(changes)}): what follows may differ by rounding from "
        "what would have been"
    )
