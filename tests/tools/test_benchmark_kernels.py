from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from conv2former.errors import UserError
from conv2former.tools.benchmark import device as benchmark_device
from conv2former.tools.benchmark import kernels as benchmark_kernels
from conv2former.tools.benchmark.device import DeviceClock, device_work, kernel_name
from conv2former.tools.benchmark.kernels import Rates, Task, Timing, describe, make_tasks, measure_kernels, time_tasks


def tiny_tasks(dtype: torch.dtype = torch.float32) -> list[Task]:
    torch.manual_seed(0)
    return make_tasks(3, 8, 5, dtype, torch.device("cpu"))


def test_tasks_compute_the_same_in_both_ways():
    """On the CPU, where the operators are the formula; the floor counts maps only, each once."""
    tasks = tiny_tasks()
    assert [task.name for task in tasks] == [
        "modulate 8 x 5 x 5 forward",
        "modulate 8 x 5 x 5 backward",
        "mlp_mix 32 x 5 x 5 forward",
        "mlp_mix 32 x 5 x 5 backward",
    ]
    numbers = 3 * 8 * 5 * 5
    size = 4 * numbers
    assert [task.floor for task in tasks] == [3 * size, 5 * size, 2 * 4 * size, 3 * 4 * size]
    assert [task.macs for task in tasks] == [121 * numbers, 3 * 121 * numbers, None, None]
    for task in tasks:
        torch.testing.assert_close(tuple(task.fused()), tuple(task.plain()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_both_ways_are_compared_with_float64(dtype, most):
    for task in tiny_tasks(dtype):
        fused, plain = task.errors()
        assert 0 < fused < most
        assert 0 < plain < most


@pytest.mark.parametrize("name", ["modulate", "modulate_backward", "mlp_mix", "mlp_mix_backward"])
def test_an_operator_that_is_wrong_has_an_error_of_its_own(monkeypatch, name):
    """In its last tensor alone, which for a backward pass may be a sum over the batch."""
    right = getattr(benchmark_kernels.operators, name)

    def wrong(*args):
        results = right(*args)
        return (*results[:-1], 1.5 * results[-1]) if isinstance(results, tuple) else 1.5 * results

    monkeypatch.setattr(benchmark_kernels.operators, name, wrong)
    errors = {task.name.replace(" 8 x 5 x 5", "").replace(" 32 x 5 x 5", ""): task.errors() for task in tiny_tasks()}
    task = name.replace("_backward", " backward") if name.endswith("backward") else f"{name} forward"
    assert errors[task][0] == pytest.approx(0.5, abs=0.01)
    assert errors[task][1] < 1e-6
    assert max(fused for other, (fused, _) in errors.items() if other != task) < 1e-6


class FakeClock:
    """Counts seconds, and how often an action is repeated."""

    def __init__(self, repetitions: int = 1, tick: float = 1.0) -> None:
        self.now, self._repetitions, self._tick = -1.0, repetitions, tick

    def repetitions(self, action) -> int:
        return self._repetitions

    def read(self, action, repetitions: int = 1) -> float:
        for _ in range(repetitions):
            action()
        self.now += 1
        return self._tick * self.now


def test_everything_is_timed_in_turns_behind_a_copy():
    order = []

    def record(name):
        return lambda: order.append(name) or [torch.ones(3)]

    task = Task("task", 10, None, record("fused"), record("plain"), lambda: order.append("errors") or (1.0, 2.0))
    copies, (timing,) = time_tasks([task], record("copy"), 2, FakeClock())
    assert order == [
        "errors",
        *("copy", "plain", "copy", "fused"),  # does not count
        *("copy", "fused", "copy", "plain"),
        *("copy", "plain", "copy", "fused"),
    ]
    assert (timing.fused, timing.plain) == ([5.0, 11.0], [7.0, 9.0])
    assert copies == [4.0, 6.0, 8.0, 10.0]
    assert timing.errors == (1.0, 2.0)
    order.clear()
    time_tasks([task], record("copy"), 1, FakeClock(repetitions=3))
    assert order[1:5] == ["copy", "plain", "plain", "plain"]


def test_the_table_has_medians_ratios_and_shares():
    tasks = [Task("task", 3 * 10**6, macs, lambda: [], lambda: [], lambda: (0.0, 0.0)) for macs in (10**6, None)]
    timings = [Timing(task, [1e-3, 2e-3, 3e-3], [4e-3, 4e-3, 4e-3], (1.6e-7, 3e-7)) for task in tasks]
    *_, first, second = describe(timings, Rates(copy=3e9, matmul=1e10))
    assert first.split() == ["task", "2000", "4000", "2.00", "3", "50%", "5.0%", "2e-07", "3e-07"]
    assert second.split()[6] == "-"


# -------------------------------------------------------------------------------------------------------- the device


class FakeGpu:
    """A device that works through its queue while a host, which needs time for each launch, fills it.

    Args:
        launch: seconds that the host needs for one launch.
        fill: seconds that the device needs for the other work.
    """

    def __init__(self, launch: float, fill: float) -> None:
        self.launch, self.fill_seconds = launch, fill
        self.host = self.device = 0.0

    def work(self, seconds: float) -> None:
        self.host += self.launch
        self.device = max(self.device, self.host) + seconds

    def fill(self) -> None:
        self.work(self.fill_seconds)

    def event(self, enable_timing: bool) -> FakeEvent:
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.time = max(self.gpu.device, self.gpu.host)

    def query(self) -> bool:
        return self.time <= self.gpu.host

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.time)

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000 * (end.time - self.time)


def test_the_device_is_timed_and_not_the_host(monkeypatch):
    """Four kernels of 20 us, which the host launches in 1 ms each, behind a filler of 1.6 ms."""
    gpu = FakeGpu(launch=1e-3, fill=1.6e-3)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)

    def action() -> None:
        for _ in range(4):
            gpu.work(20e-6)

    clock = DeviceClock(gpu.fill)
    assert clock.read(action) == pytest.approx(80e-6)
    assert clock.repetitions(action) == 3  # 0.2 ms at least
    assert clock.read(action, 3) == pytest.approx(80e-6)
    assert clock.repetitions(lambda: gpu.work(1e-6)) == 10
    assert clock.repetitions(lambda: gpu.work(1.0)) == 1


def test_a_host_that_is_too_slow_is_no_result(monkeypatch):
    gpu = FakeGpu(launch=1.0, fill=1e-3)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(benchmark_device, "MAX_FILLS", 4)
    with pytest.raises(RuntimeError, match="the GPU waited for Python although it was given 4 large matrix products"):
        DeviceClock(gpu.fill).read(lambda: gpu.work(1e-3))


def event(name: str, start: float, end: float, device=DeviceType.CUDA, **more):
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end), **more)


def test_what_the_profiler_saw():
    events = [
        event("void at::native::add<float>(int)", 0, 10),
        event("band_kernel", 5, 20),  # at the same time on another stream
        event("band_kernel", 30, 40),
        event("Memset (Device)", 40, 41),
        event("Memcpy DtoD (Device -> Device)", 50, 51),
        event("Optimizer.step#AdamW.step", 0, 100),
        event("my range", 0, 100, is_user_annotation=True),
        event("aten::add", 0, 100, DeviceType.CPU),
    ]
    work = device_work(events, steps=1)
    assert work.kernels == {"void at::native::add<float>(int)": 1, "band_kernel": 2}
    assert (work.fills, work.copies, work.launches) == (1, 1, 5)
    assert math.isclose(work.busy, 32e-6)
    assert device_work(events, steps=2).kernels["band_kernel"] == 1
    assert kernel_name("void at::native::(anonymous namespace)::norm<float>(int)") == "norm<float>(int)"


# ----------------------------------------------------------------------------------------------- the whole measurement


def test_without_a_gpu_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="need an NVIDIA GPU, and torch finds none here"):
        list(measure_kernels(1, torch.float32, 1))


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    """Puts the CPU in the place of a GPU that has kernels, and tiny maps in that of the stages'."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch, "device", lambda *args: cpu)
    monkeypatch.setattr(benchmark_kernels, "copy_probe", lambda device: (lambda: None, 10**9))
    monkeypatch.setattr(benchmark_kernels, "matmul_probe", lambda device, dtype: (lambda: None, 10**12))
    monkeypatch.setattr(benchmark_kernels, "STAGES", ((8, 4), (16, 2), (24, 2), (32, 1)))
    monkeypatch.setattr(benchmark_kernels, "DeviceClock", lambda fill: FakeClock(tick=1e-6))
    monkeypatch.setattr(benchmark_kernels, "supports_operators", lambda x, kernel_size: True)


def test_a_gpu_without_kernels(monkeypatch, cpu_as_gpu):
    monkeypatch.setattr(benchmark_kernels, "supports_operators", lambda x, kernel_size: False)
    with pytest.raises(UserError, match=r"Some GPU runs no fused operators for torch.float32"):
        list(measure_kernels(2, torch.float32, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_measurement_with_the_cpu_in_the_place_of_a_gpu(cpu_as_gpu, dtype):
    title, *lines = measure_kernels(2, dtype, 2)
    kind = str(dtype).removeprefix("torch.")
    assert title.startswith(f"Some GPU, batch 2, {kind}, medians of 2 rounds; a copy moves ")
    assert "T multiply-adds/s; errors are relative to float64, of 2 images" in title
    assert len([line for line in lines if "forward" in line or "backward" in line]) == 16
    assert len({len(line) for line in lines}) == 1  # rows are aligned although each is printed by itself


def test_some_stages(cpu_as_gpu):
    lines = list(measure_kernels(2, torch.float32, 1, stages=[4, 2]))[2:]
    assert [line.split("  ")[0] for line in lines[::2]] == [
        "modulate 32 x 1 x 1 forward", "mlp_mix 128 x 1 x 1 forward",
        "modulate 16 x 2 x 2 forward", "mlp_mix 64 x 2 x 2 forward",
    ]  # fmt: skip


def test_the_depthwise_convolution_alone(monkeypatch, cpu_as_gpu):
    monkeypatch.setattr(benchmark_kernels, "DEPTHWISE", [(3, 5), (4, 7)])
    lines = list(measure_kernels(2, torch.float32, 1, depthwise=True))[2:]
    assert [line.split("  ")[0] for line in lines] == [
        "5 x 5, 64 x 3 x 3 forward", "5 x 5, 64 x 3 x 3 backward",
        "7 x 7, 64 x 4 x 4 forward", "7 x 7, 64 x 4 x 4 backward",
    ]  # fmt: skip
    assert all(float(line.split()[-2]) < 1e-5 for line in lines)  # it is the convolution, to float32's rounding


def test_an_operator_that_fails_is_a_row_and_the_others_go_on(monkeypatch, cpu_as_gpu):
    def broken(*args):
        raise RuntimeError("The output of this custom operator may not alias any inputs\nmore")

    monkeypatch.setattr(benchmark_kernels.operators, "mlp_mix_backward", broken)
    lines = list(measure_kernels(2, torch.float32, 1, stages=[1]))
    reason = "not measured: The output of this custom operator may not alias any inputs"
    assert lines[-1] == f"mlp_mix 32 x 4 x 4 backward: {reason}"
    assert [line.split("  ")[0] for line in lines[2:-1]] == [
        "modulate 8 x 4 x 4 forward",
        "modulate 8 x 4 x 4 backward",
        "mlp_mix 32 x 4 x 4 forward",
    ]
    monkeypatch.setattr(benchmark_kernels, "make_tasks", broken)
    with pytest.raises(UserError, match="nothing could be measured; the reasons are above"):
        list(measure_kernels(2, torch.float32, 1))
