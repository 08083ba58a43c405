"""Compiles the Triton kernels for a GPU that need not be there: `python triton_compile.py CAPABILITY [--all]`.

Writes a line of JSON for each kernel: registers of a thread, bytes that it spills to local memory, shared memory of a
program, how many programs a multiprocessor has room for, and how often the machine code has which kind of instruction:
once for each place, however often a loop comes there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from conv2former.ops.branch import BranchCall, BranchParams, BranchSpec, SpatialMixing
from conv2former.ops.cuda import branch, mixing, rows

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Of a multiprocessor of all NVIDIA's data centre GPUs since 2020; 227 KB is what a program may have of Hopper's 228
REGISTERS, SHARED_BYTES, WARPS, PROGRAMS = 65_536, {80: 163 * 1024}, 64, 32
KINDS = {
    "matrix": ("HMMA", "MMA", "UTCHMMA", "UTCMMA", "HGMMA"),
    "special": ("MUFU",),
    "global": ("LDG", "STG"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "local": ("LDL", "STL"),
}


def compile_kernel(kernel: Any, capability: int, *args: Any, warps: int = 4, **constants: Any) -> dict[str, Any]:
    """Compiles a kernel for the arguments that `launch.launch` gets, and returns its report."""
    names = kernel.arg_names
    options = {"num_warps": warps, "enable_fp_fusion": True, "maxnreg": constants.pop("maxnreg", None)}
    given = dict(zip(names, args, strict=False))
    signature = {n: TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32" for n, x in given.items()}
    source = ASTSource(
        kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, x in enumerate(args) if isinstance(x, torch.Tensor)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)[0]
    return {
        "kernel": kernel.fn.__name__,
        "constants": constants,
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "programs": programs_per_multiprocessor(int(registers), compiled.metadata.shared, warps, capability),
        "instructions": instructions(code),
    }


def programs_per_multiprocessor(registers: int, shared: int, warps: int, capability: int) -> int:
    """Returns how many programs of a kernel a multiprocessor has room for at a time."""
    of_a_warp = -(-registers * 32 // 256) * 256  # registers are given out by 256
    limits = [REGISTERS // (of_a_warp * warps), WARPS // warps, PROGRAMS]
    return min(*limits, SHARED_BYTES.get(capability, 227 * 1024) // shared if shared else PROGRAMS)


def instructions(code: str) -> dict[str, int]:
    """Counts the instructions of machine code as nvdisasm prints it, all and by kind."""
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    names = [name for name in names if name != "NOP"]
    return {"all": len(names)} | {kind: sum(name in of for name in names) for kind, of in KINDS.items()}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def make_call(kind: SpatialMixing, n: int, channels: int, kernel_size: int, dtype: torch.dtype) -> BranchCall:
    """Returns a branch with parameters in float32, computed in `dtype`, as under autocast."""
    modulates = kind is SpatialMixing.MODULATION
    inner, side = (channels, kernel_size) if modulates else (4 * channels, 3)
    params = BranchParams(
        norm_weight=empty(channels),
        norm_bias=empty(channels),
        conv_weight=empty(inner, 1, side, side),
        conv_bias=empty(inner),
        out_weight=empty(channels, inner, 1, 1),
        out_bias=empty(channels),
        gamma=empty(channels),
        in_weights=tuple(empty(inner, channels, 1, 1) for _ in range(kind.value)),
        in_biases=tuple(empty(inner) for _ in range(kind.value)),
    )
    return BranchCall(BranchSpec(kind, 1e-6, True, dtype, dtype, torch.float32), params, empty(n, 1, 1, 1))


def compile_stage(capability: int, n: int, channels: int, size: int, kernel_size: int, dtype: torch.dtype) -> None:
    """Compiles what a block of one stage launches, forward and backward."""
    seen = set()

    def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        types = tuple(x.dtype for x in args if isinstance(x, torch.Tensor))
        if (key := (kernel, types, *constants.items())) not in seen:
            seen.add(key)
            print(json.dumps(compile_kernel(kernel, capability, *args, **constants)), flush=True)

    with mock.patch.object(mixing, "launch", launch), mock.patch.object(rows, "launch", launch):
        for call in branch.prepare([make_call(kind, n, channels, kernel_size, dtype) for kind in SpatialMixing]):
            x, saved = empty(n, channels, size, size).contiguous(memory_format=torch.channels_last), []
            branch.backward(call, x, saved, branch.forward([call], x, saved), True)


if __name__ == "__main__":
    compile_stage(int(sys.argv[1]), 128, 72, 56, 11, torch.bfloat16)
    if "--all" in sys.argv:  # takes minutes
        for dtype in TYPES:
            for n, kernel_size in ((128, 11), (1, 11), (128, 7), (128, 3), (1, 31)):
                for stage in range(4):
                    compile_stage(int(sys.argv[1]), n, 72 * 2**stage, 56 // 2**stage, kernel_size, dtype)
