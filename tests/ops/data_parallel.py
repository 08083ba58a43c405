"""Gradients of two processes by every backend, against the plain formula's, for test_operators.py to run in forks.

Process 0 writes a line of JSON: for each backend the largest relative difference of a gradient.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from conv2former.models.backbone import Conv2Former
from conv2former.models.compiled import compile_blocks
from conv2former.ops import autograd

from .interpreter import INTERPRETS

SIDE = 32  # pixels; the interpreter takes its time


def gradients(is_fused: bool, compiled: str = "", dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    options = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "kernel_size": 5, "head_hidden_size": 16}
    network = Conv2Former(num_classes=3, ls_init_value=0.1, fused=is_fused, dtype=torch.float64, **options)
    network.to(dtype)
    module = DistributedDataParallel(network)
    if compiled == "blocks":
        compile_blocks((block for stage in network.stages for block in stage.blocks), _count)
        # buckets that end inside of a block, where torch.compile would cut a program
        module = DistributedDataParallel(network, bucket_cap_mb=0.001)
    images = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64, generator=images).to(dtype)
    forward = torch.compile(module, backend="aot_eager") if compiled == "whole" else module
    F.cross_entropy(forward(x), torch.arange(3)).backward()
    return [p.grad for p in network.parameters()]


programs = []


def _count(program, inputs):
    programs.append(program)
    return torch._dynamo.lookup_backend("aot_eager")(program, inputs)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    exact = gradients(False)
    grads_of = {"eager": gradients(True), "compiled": gradients(True, "whole")}
    for fused in (True, False):  # by their parameters, by their modules
        grads_of[f"blocks, fused: {fused}"] = gradients(fused, "blocks")
    assert len(programs) == 8, len(programs)
    if INTERPRETS:
        from conv2former.ops.cuda import branch, mixing  # Triton is optional

        mixing.choose_strip = lambda width, choices: 2  # less to interpret
        calls, backward = [], branch.backward
        branch.backward = lambda *args: (calls.append(1), backward(*args))[1]
        autograd.choose_backend = lambda *args, **options: branch
        autograd.prepare = lambda calls, x: branch.prepare(calls)
        grads_of["cuda"] = gradients(True, dtype=torch.float32)
        assert len(calls) == 10  # branches
    if dist.get_rank() == 0:
        differences = {
            backend: max(((a - b).norm() / b.norm()).item() for a, b in zip(grads, exact, strict=True))
            for backend, grads in grads_of.items()
        }
        print(json.dumps(differences), flush=True)
    dist.destroy_process_group()
