from __future__ import annotations

import pytest
import torch

from conv2former.errors import UserError
from conv2former.tools.benchmark import kernels as benchmark_kernels
from conv2former.tools.benchmark.kernels import Task, Timing, describe, make_tasks, measure_kernels, time_tasks


def tiny_tasks() -> list[Task]:
    torch.manual_seed(0)
    return make_tasks(2, 8, 5, torch.float32, torch.device("cpu"))


def test_tasks_compute_the_same_in_both_ways():
    """On the CPU, where the operators are the formula; the floor counts maps only, each once."""
    tasks = tiny_tasks()
    assert [task.name for task in tasks] == [
        "modulate 8 x 5 x 5 forward",
        "modulate 8 x 5 x 5 backward",
        "mlp_mix 32 x 5 x 5 forward",
        "mlp_mix 32 x 5 x 5 backward",
    ]
    size = 2 * 8 * 5 * 5 * 4
    assert [task.floor for task in tasks] == [3 * size, 5 * size, 2 * 4 * size, 3 * 4 * size]
    for task in tasks:
        torch.testing.assert_close(tuple(task.fused()), tuple(task.plain()), rtol=1e-5, atol=1e-5)


def test_everything_is_timed_in_turns_behind_a_copy():
    order = []
    seconds = iter(range(100))

    def clock(action) -> float:
        action()
        return float(next(seconds))

    def record(name):
        return lambda: order.append(name) or [torch.ones(3)]

    task = Task("task", 10, record("fused"), record("plain"))
    copies, (timing,) = time_tasks([task], record("copy"), 2, clock)
    assert order == [
        *("fused", "plain"),  # compared
        *("copy", "plain", "copy", "fused"),  # does not count
        *("copy", "fused", "copy", "plain"),
        *("copy", "plain", "copy", "fused"),
    ]
    assert (timing.fused, timing.plain) == ([5.0, 11.0], [7.0, 9.0])
    assert copies == [4.0, 6.0, 8.0, 10.0]
    assert timing.difference == 0


def test_the_table_has_medians_ratios_and_shares():
    task = Task("task", 3 * 10**6, lambda: [], lambda: [])
    lines = describe([Timing(task, [1e-3, 2e-3, 3e-3], [4e-3, 4e-3, 4e-3], 1.6e-7)], 3e9)
    assert lines[-1].split() == ["task", "2000", "4000", "2.00", "3", "50%", "2e-07"]


def test_without_a_gpu_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="need an NVIDIA GPU, and torch finds none here"):
        list(measure_kernels(1, torch.float32, 1))


def test_the_whole_measurement_with_the_cpu_in_the_place_of_a_gpu(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch, "device", lambda *args: cpu)
    monkeypatch.setattr(benchmark_kernels, "copy_probe", lambda device: (lambda: None, 1000))
    monkeypatch.setattr(benchmark_kernels, "STAGES", ((8, 4), (16, 2)))
    monkeypatch.setattr(benchmark_kernels, "cuda_seconds", lambda action: 1e-3 * len(action() or "1"))
    with pytest.raises(UserError, match=r"Some GPU runs no fused operators for torch.float32"):
        list(measure_kernels(2, torch.float32, 2))
    monkeypatch.setattr(benchmark_kernels, "supports_operators", lambda x, kernel_size: True)
    lines = list(measure_kernels(2, torch.float32, 2))
    assert lines[0].startswith("Some GPU, batch 2, float32, medians of 2 rounds; a copy moves 0 GB/s")
    assert len([line for line in lines if "forward" in line or "backward" in line]) == 8


def test_an_operator_that_fails_is_a_row_and_the_others_go_on(monkeypatch):
    def broken(*args):
        raise RuntimeError("The output of this custom operator may not alias any inputs\nmore")

    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch, "device", lambda *args: cpu)
    monkeypatch.setattr(benchmark_kernels, "copy_probe", lambda device: (lambda: None, 1000))
    monkeypatch.setattr(benchmark_kernels, "STAGES", ((8, 4),))
    monkeypatch.setattr(benchmark_kernels, "cuda_seconds", lambda action: 1e-3 * len(action() or "1"))
    monkeypatch.setattr(benchmark_kernels, "supports_operators", lambda x, kernel_size: True)
    monkeypatch.setattr(benchmark_kernels.operators, "mlp_mix_backward", broken)
    lines = list(measure_kernels(2, torch.float32, 1))
    error = "not measured: The output of this custom operator may not alias any inputs"
    assert lines[-1] == f"mlp_mix 32 x 4 x 4 backward: {error}"
    assert [line.split("  ")[0] for line in lines[2:-1]] == [
        "modulate 8 x 4 x 4 forward",
        "modulate 8 x 4 x 4 backward",
        "mlp_mix 32 x 4 x 4 forward",
    ]
    assert len({len(line) for line in lines[1:-1]}) == 1  # rows are aligned although each is printed by itself

    monkeypatch.setattr(benchmark_kernels, "make_tasks", broken)
    with pytest.raises(UserError, match="nothing could be measured; the reasons are above"):
        list(measure_kernels(2, torch.float32, 1))
