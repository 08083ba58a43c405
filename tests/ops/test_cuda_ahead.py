"""Which kernels are compiled before they are run, and that it is done once."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from conv2former.ops import autograd
from conv2former.ops.branch import BranchCall, SpatialMixing

from .interpreter import INTERPRETS
from .test_cuda_branch import TYPES, image_maps, make_call

if not INTERPRETS:
    pytest.skip("needs Triton, and its interpreter chosen", allow_module_level=True)

from conv2former.ops.cuda import ahead, branch, mixing, row_kernels
from conv2former.ops.cuda.launch import intercepting


def signature(kernel, args, options) -> tuple:
    types = [arg.dtype if isinstance(arg, Tensor) else arg for arg in args]
    numbers_alike = tuple(t if isinstance(t, torch.dtype) else "number" for t in types)
    return kernel.fn.__name__, numbers_alike, tuple(options.items())


def launched(calls: list[BranchCall], x: Tensor, trains: bool) -> set[tuple]:
    """Returns what a run with data launches."""
    found = set()
    with torch.set_grad_enabled(trains), intercepting(lambda *launch: found.add(signature(*launch))):
        y = autograd.residual_branches(calls, x)
        if trains:
            y.backward(torch.empty_like(y))
    return found


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("programs", [1, 10**9])  # on tensor cores and not
@pytest.mark.parametrize("types", TYPES[:2], ids=str)
def test_what_is_compiled_is_what_is_run(on_a_gpu, monkeypatch, types, programs, trains):
    monkeypatch.setattr(mixing, "MIN_BAND_PROGRAMS", programs)
    calls = [make_call(kind, types, channels=8, mask=mask) for mask in (False, True, True) for kind in SpatialMixing]
    for parameter in (t for call in calls for t in call.params.tensors() if t is not None):
        parameter.requires_grad_()
    x = image_maps(0, 2, 8, 5, 6, dtype=types[1])
    compiled = []
    for name in {name for name, *_ in launched(calls, x, trains)}:
        for module in (mixing, row_kernels):
            if hasattr(module, name):
                kernel = getattr(module, name)
                monkeypatch.setattr(
                    type(kernel), "warmup",
                    lambda self, *args, grid, **options: compiled.append((self, args, options)), raising=False,
                )  # fmt: skip
    for job in ahead.kernels_of(calls, x, trains):
        job()
    found = {signature(*launch) for launch in compiled}
    assert found == launched(calls, x, trains)
    assert len(compiled) == len(found), "each once"


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(ahead, "_seen", set())
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda pid: range(4))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def test_other_threads_run_their_kernels():
    """While one looks for what it has to compile."""
    call, x = make_call(SpatialMixing.MLP, TYPES[0]), image_maps(0, 1, 8, 2, 2, dtype=torch.float32)
    expected, results = branch.forward([call], x, None), []
    with intercepting(lambda *_: results.append(None)):
        thread = threading.Thread(target=lambda: results.append(branch.forward([call], x, None)))
        thread.start()
        thread.join()
    (result,) = results
    assert torch.equal(result, expected)


def test_once_for_a_cut_on_all_cores(four_cores, monkeypatch):
    jobs, together = [], threading.Barrier(2, timeout=60)

    def job() -> None:
        jobs.append(threading.current_thread().name)
        together.wait()  # ends when two are at work

    monkeypatch.setattr(ahead, "kernels_of", lambda calls, x, trains: [job, job])
    calls, x = [make_call(SpatialMixing.MLP, TYPES[0])], image_maps(0, 2, 8, 3, 8, dtype=torch.float32)
    for trains in (True, True, False):
        ahead.compile_ahead(calls, x, trains)
    assert len(jobs) == 4
    ahead.compile_ahead(calls, x[:1, :, :2], True)  # cut in the same way
    assert len(jobs) == 4
    ahead.compile_ahead(calls, x[..., :7], True)
    assert len(jobs) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # where each process has a core, Triton compiles at the first run
    ahead.compile_ahead(calls, x[..., :7].double(), True)
    assert len(jobs) == 6


@pytest.mark.parametrize("types", TYPES[:2], ids=str)
def test_maps_that_are_cut_in_the_same_way_share_their_kernels(types):
    """Sizes with borders between ways to cut among them, and images enough for the tensor cores or not."""
    calls = [make_call(kind, types, channels=8) for kind in SpatialMixing]
    kernels: dict[Hashable, set[tuple]] = {}
    sizes = [(n, h, w) for n in (1, 2048) for h, w in ((5, 7), (9, 7), (7, 8), (14, 14), (14, 20), (20, 56), (9, 64))]
    for n, h, w in sizes:
        x = torch.empty(n, 8, h, w, dtype=types[1], device="meta").contiguous(memory_format=torch.channels_last)
        jobs = ahead.kernels_of(calls, x, True)
        found = {signature(job.func.__self__, job.args, job.keywords) for job in jobs}
        assert kernels.setdefault(mixing.cuts(x.shape, types[0], 5), found) == found
    assert 1 < len(kernels) < len(sizes)
    assert len({frozenset(found) for found in kernels.values()}) > 1


def test_what_cannot_be_compiled_is_told_by_the_launch(four_cores, monkeypatch):
    def fails() -> None:
        raise RuntimeError

    monkeypatch.setattr(ahead, "kernels_of", lambda *_: [fails, fails])
    ahead.compile_ahead([make_call(SpatialMixing.MLP, TYPES[0])], image_maps(0, 1, 8, 2, 2, dtype=torch.float32), True)


@pytest.mark.parametrize(("row", "expected"), [("ABABABAB", "ABAB"), ("abABABAB", "abABAB"), ("A", "A"), ("AAA", "AA")])
def test_a_row_that_repeats_itself(monkeypatch, row, expected):
    monkeypatch.setattr(ahead, "_kind", lambda call: call)
    assert "".join(ahead._shortened(row)) == expected
