"""The bytes that a residual branch moves on a GPU, counted from what it launches: the table of docs/performance.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conv2former.ops.branch import BranchCall, BranchSpec, SpatialMixing

from ..conftest import ROOT
from .branches import make_params
from .interpreter import INTERPRETS

if not INTERPRETS:
    pytest.skip("needs Triton, and its interpreter chosen", allow_module_level=True)

from conv2former.ops.cuda import branch
from conv2former.ops.cuda.launch import intercepting

N, C, SIDE = 128, 72, 56  # stage 1 of conv2former_t


class Traffic(TorchDispatchMode):
    """Adds up the bytes of what kernels and matrix products read and write, each tensor once for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def count(self, name: str, tensors: list) -> None:
        # a half of a wider map is as wide as it is; where a kernel does without a tensor, it gets another one twice
        sizes = {(t.data_ptr() if t.device.type != "meta" else id(t)): t.numel() * t.element_size() for t in tensors}
        self.bytes[name] += sum(sizes.values())

    def launched(self, kernel, args, options) -> None:
        self.count(kernel.fn.__name__.removesuffix("_kernel"), [arg for arg in args if isinstance(arg, Tensor)])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name() in ("aten::mm", "aten::addmm", "aten::sum.dim_IntList", "aten::mm.out"):
            self.count("products", [arg for arg in args if isinstance(arg, Tensor)] + [out])
        return out


def traffic(kind: SpatialMixing) -> tuple[Counter[str], Counter[str]]:
    """Returns the bytes of a forward and a backward pass, for each number of the branch's map, by kernel."""
    inner, side = (C, 11) if kind is SpatialMixing.MODULATION else (4 * C, 3)
    params = make_params(kind, C, inner, side, gamma=True)
    tensors = [None if t is None else t.to("meta", torch.float32) for t in params.tensors()]
    spec = BranchSpec(kind, 1e-6, True, torch.bfloat16, torch.bfloat16, torch.float32)
    call = BranchCall(spec, type(params).from_tensors(tensors), torch.empty(N, 1, 1, 1, device="meta"))
    x = torch.empty(N, C, SIDE, SIDE, device="meta").contiguous(memory_format=torch.channels_last)
    found: list[Counter[str]] = []
    tasks = []

    def counted(run: Callable[[], Any]) -> Any:
        counter = Traffic()
        with torch.no_grad(), intercepting(counter.launched), counter:
            result = run()
        found.append(Counter({name: count / x.numel() for name, count in counter.bytes.items()}))
        return result

    # the one in the middle counts: its neighbours compute its norm, and go back through its residual sum
    for linked in branch.prepare([call, call, call]):
        saved: list[Tensor] = []
        tasks.append((linked, x, saved))
        x = counted(lambda: branch.forward([linked], x, saved))  # noqa: B023, at once
    grad = x.clone()
    for task in reversed(tasks):
        grad, _ = counted(lambda: branch.backward(*task, grad, True))  # noqa: B023, at once
    return found[1], found[4]


@pytest.mark.parametrize("kind", SpatialMixing)
def test_the_table_of_the_docs(kind):
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    name = "modulation" if kind is SpatialMixing.MODULATION else "MLP"
    found = re.search(rf"^\| {name} \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert [int(n) for n in found.groups()] == [round(passed.total()) for passed in traffic(kind)]
