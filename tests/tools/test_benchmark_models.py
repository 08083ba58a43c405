"""Networks side by side: names, counts, ratios, what fails, what is written, on networks of a few milliseconds."""

from __future__ import annotations

import importlib
import json
import runpy
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conv2former import graphs
from conv2former.errors import ConfigError, OutputError
from conv2former.ops.cpu import native, onednn
from conv2former.tools.benchmark import machine as benchmark_machine
from conv2former.tools.benchmark import models as benchmark_models
from conv2former.tools.benchmark import networks as benchmark_networks
from conv2former.tools.benchmark import steps as benchmark_steps
from conv2former.tools.benchmark.machine import OperatorTraffic
from conv2former.tools.benchmark.models import measure
from conv2former.tools.benchmark.networks import count_macs, parse_networks
from conv2former.tools.benchmark.report import (
    check_outputs,
    models_foot,
    models_group,
    models_head,
    models_markdown,
    put_section,
)
from conv2former.tools.benchmark.results import Baseline, Group, Plan, Probe, Report, Result, Setting, Spread, spread

from ..conftest import ROOT
from ..graphs_on_cpu import CpuRecorder

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
OURS = "conv2former_n:dims=[8,16,16,16],depths=[1,1,1,1],kernel_size=3,head_hidden_size=16"
FIXED = "test_vit:img_size=64,dynamic_img_size=false"  # takes no other size
SETTING = Setting("training", "fp32", 224, 224, 8, "nchw", "eager")


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    monkeypatch.setitem(benchmark_machine.MATMUL_SIDE, "cpu", 64)
    monkeypatch.setitem(benchmark_machine.COPY_BYTES, "cpu", 2**16)


def small_plan(*labels: str, **changes) -> Plan:
    plan = {"sizes": [(32, 32)], "batch_sizes": [2], "rounds": 2, "steps": 1, "details": False}
    return Plan(parse_networks(labels), CPU, **(plan | changes))


def run(*labels: str, **changes) -> Report:
    return measure(small_plan(*labels, **changes), Baseline(labels[0]))


def models_text(report: Report) -> str:
    """Returns all that a terminal shows."""
    return "\n".join([models_head(report), *(models_group(report, g) for g in report.groups), models_foot(report)])


def script(monkeypatch, *words) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark.py", *map(str, words)])
    runpy.run_path("scripts/benchmark.py", run_name="__main__")


# ----------------------------------------------------------------------------------------------------------- networks


def test_names_and_options():
    ours, fused, birder = parse_networks([OURS, "test_vit:fused_attn=false,img_size=64", "test_vit"])
    assert dict(ours.options) == {
        "dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "kernel_size": 3, "head_hidden_size": 16,
    }  # fmt: skip
    assert ours.create(32, 32).stages[0].blocks[0].attn.conv_dw.weight.shape == (8, 1, 3, 3)
    assert (fused.fused_attention, fused.options) == (False, (("img_size", 64),))
    assert not fused.create(64, 64).blocks[0].attn.fused_attn
    assert birder.create(64, 64).blocks[0].attn.fused_attn  # the switch is back


def test_a_network_for_one_size_is_made_for_the_size_that_is_measured():
    (network,) = parse_networks(["test_vit"])
    assert network.create(64, 96)(torch.zeros(1, 3, 64, 96)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["test_vlt", "test_convnexxt"], r"test_vlt: timm has no .* test_vit.*\n.*test_convnexxt: .* test_conv"),
        (["test_vit", "test_vit"], "test_vit is named twice"),
        (["test_vit:img_size"], "expected NAME:option=value,option=value, but found 'img_size'"),
        (["test_vit:img_size=["], "the value of img_size cannot be read"),
        (["test_vit:fused_attn=2"], "fused_attn must be true or false: 2"),
    ],
)  # fmt: skip
def test_mistakes_in_names(labels, message):
    with pytest.raises(ConfigError, match=message):
        parse_networks(labels)


def test_options_that_a_network_does_not_take_end_the_run():
    with pytest.raises(ConfigError, match=r"test_vit:banana=1: .* cannot be made with these options: .*banana"):
        run("test_vit", "test_vit:banana=1")


def test_birder_is_optional(monkeypatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(benchmark_networks.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install birder"):
        parse_networks(["birder/conv2former_t"])


@pytest.mark.skipif(importlib.util.find_spec("birder") is None, reason="birder is not installed")
def test_birder():
    (network,) = parse_networks(["birder/conv2former_n"])
    assert round(count_macs(network.create(224, 224), 224, 224) / 1e9, 3) == 2.330
    with pytest.raises(ConfigError, match="closest are birder/conv2former_"):
        parse_networks(["birder/conv2former_x"])


# ------------------------------------------------------------------------------------------------------------- counts


def test_multiply_accumulates_are_those_of_the_facts():
    (network,) = parse_networks(["conv2former_n"])
    model = network.create(224, 224)
    assert round(count_macs(model, 224, 224) / 1e9, 3) == 2.330
    assert all(parameter.device == CPU for parameter in model.parameters())
    assert model.training


def test_multiply_accumulates_inside_functions_count_and_recomputed_ones_do_not():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x @ weight

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 5))

        def forward(self, x):
            return checkpoint(Product.apply, x, self.weight, use_reentrant=False)

    assert count_macs(Network(), 4, 8) == 3 * 4 * 8 * 5  # a batch of one, (3, 4, 8)


def test_traffic_by_hand():
    a = torch.zeros(10, 20)
    with OperatorTraffic() as traffic:
        a.t().reshape(10, 20)  # a copy: read and written
    assert traffic.bytes_moved == 2 * 800
    with OperatorTraffic() as traffic:
        a.view(20, 10).add(torch.zeros(1).expand(20, 10))  # the view moves nothing; the expanded number is read once
    assert traffic.bytes_moved == 800 + 4 + 800 + 4  # and the zero was written


def test_traffic_of_compiled_functions():
    if not native.usable(torch.float32):
        pytest.skip("no C++ compiler")
    u, weight, bias = torch.zeros(2, 4, 4, 16), torch.zeros(16, 1, 3, 3), torch.zeros(16)
    out = torch.empty_like(u)
    with OperatorTraffic() as traffic:
        native.mlp_mix(u, weight, bias, out)
    assert traffic.bytes_moved == 4 * (2 * u.numel() + weight.numel() + bias.numel())
    native.mlp_mix(u, weight, bias, out)
    assert traffic.bytes_moved == 4 * (2 * u.numel() + weight.numel() + bias.numel())  # nobody counts any more


# ------------------------------------------------------------------------------------------------------------- ratios


def test_spread():
    assert spread([]) is None
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(2.0, 3.0, 4.0)


def test_speed_is_the_median_of_the_ratios_within_rounds():
    slow = Result("slow", SETTING, macs=100, seconds=[2.0, 20.0, 3.0, 4.0])
    fast = Result("fast", SETTING, macs=50, seconds=[1.0, 10.0, 1.0])  # interrupted in the fourth round
    assert fast.speed_over(slow) == Spread(2.0, 2.0, 2.5)
    assert fast.images_per_second.median == 8.0
    group = Group([slow, fast])
    text = models_text(Report("", MACHINE, Baseline("slow"), 4, 2, [group]))
    row = next(line for line in text.splitlines() if line.startswith("fast"))
    assert "2.00 (2.00-2.50)  " in row
    assert row.split("2.50)")[1].split()[0] == "1.00"  # twice as fast at half the arithmetic


MACHINE = {
    "cpu": "a CPU", "cpu_capability": "AVX2", "cores": 2, "cores_usable": 2, "threads": 2, "load_average": 0.0,
    "python": "3.12", "packages": {},
}  # fmt: skip


def test_shares_of_the_machine():
    result = Result("a", SETTING, macs=1000, seconds=[2.0, 4.0])
    probe = Probe(work=48_000, seconds=[1.0, 2.0])
    assert result.step_macs == 3 * 1000 * 8
    assert result.share_of(result.step_macs, probe) == pytest.approx(0.25)
    assert result.share_of(None, probe) is None


def test_the_baseline_has_the_rows_format_unless_one_is_named():
    results = [
        Result(name, Setting("training", "fp32", 32, 32, 2, format_, "eager"), seconds=[1.0])
        for name in ("a", "b") for format_ in ("nchw", "channels_last")
    ]  # fmt: skip
    group = Group(results)
    assert group.baseline_of(results[2], Baseline("a")) is results[0]
    assert group.baseline_of(results[3], Baseline("a")) is results[1]
    assert group.baseline_of(results[2], Baseline("a", "channels_last")) is results[1]
    results[1].seconds = []
    assert group.baseline_of(results[3], Baseline("a")) is None


def test_reading_a_baseline():
    plan = small_plan("test_vit", OURS, memory_formats=["nchw", "channels_last"])
    assert Baseline.parse(f"{OURS}@channels_last@eager", plan) == Baseline(OURS, "channels_last", "eager")
    with pytest.raises(ConfigError, match="--baseline other: not among the networks"):
        Baseline.parse("other", plan)
    with pytest.raises(ConfigError, match="'compile' is not among what is measured"):
        Baseline.parse("test_vit@compile", plan)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_network_takes_every_place(count):
    orders = [benchmark_models._order(count, number) for number in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert {order[0] for order in orders} == set(range(count))


# ---------------------------------------------------------------------------------------------------------- measuring


def test_all_settings_with_every_figure():
    report = run(
        OURS, modes=["training", "inference"], precisions=["bf16", "fp16"],
        memory_formats=["nchw", "channels_last"], details=True,
    )  # fmt: skip
    assert len(report.groups) == 4
    for group in report.groups:
        assert len(group.results) == 2
        assert {name: len(probe.seconds) for name, probe in group.probes.items()} == {"matmul": 2, "copy": 2}
        for result in group.results:
            assert result.error is None
            assert len(result.seconds) == 2
            assert min(result.seconds) > 0
            assert result.macs > 0
            assert result.bytes_moved > 0
            assert (result.bytes_held_per_image is not None) == (group.setting.mode == "training")
            assert result.peak_bytes > 4 * result.parameters * (3 if group.setting.mode == "training" else 1)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["format"] == 1
    assert content["groups"][0]["results"][0]["setting"]["precision"] == "bf16"
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert "Training step, bf16, eager, 32 x 32 pixels, batch 2" in models_text(report)


def test_processors_without_16_bits(monkeypatch):
    """Nothing there is as fast as a product of float32, and `native` is that alone."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has_them in (True, False):
        monkeypatch.setattr(onednn, "multiplies", lambda dtype, has_them=has_them: has_them)
        assert benchmark_machine.native_precisions(cpu) == (["fp32", "bf16"] if has_them else ["fp32"])
        assert benchmark_machine.native_precisions(cuda) == ["fp32", "bf16"]
        machine = benchmark_machine.describe_machine(cpu)
        assert any("no bf16 arithmetic" in line for line in benchmark_machine.machine_lines(machine)) != has_them
        made = []
        monkeypatch.setattr(benchmark_machine, "MATMUL_SIDE", {"cpu": 4})
        monkeypatch.setattr(torch, "mm", lambda a, b, out, made=made: made.append(a.dtype))
        benchmark_machine.matmul_probe(cpu, torch.bfloat16)[0]()
        assert made == [torch.bfloat16 if has_them else torch.float32]


def test_warming_up_lasts_until_fp16_takes_a_step():
    """The scaler leaves the optimizer out while its scale is too large; such steps are not what is timed."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    steps: list[int] = []

    def step() -> None:
        steps.append(1)
        if len(steps) == 3:
            optimizer.state["state"] = {}

    benchmark_steps.warm_up(step, optimizer)
    assert len(steps) == 3
    benchmark_steps.warm_up(step, None)
    assert len(steps) == 4


def test_compiled():
    report = run(OURS, modes=["training"], executions=["eager", "compile"], compile_backend="aot_eager")
    eager, compiled = report.groups[0].results
    assert (eager.error, compiled.error) == (None, None)
    assert len(compiled.seconds) == 2
    assert compiled.bytes_moved is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_training_step_is_the_step(monkeypatch, precision):
    """In a recorder that stands for CUDA's: the same weights after some steps, and a new capture in none of them."""
    weights, recorders = [], []

    def make(device):
        recorders.append(CpuRecorder(model))
        return recorders[-1]

    monkeypatch.setattr(graphs, "recorder_for", make)
    for captured in (False, True):
        torch.manual_seed(0)
        model = parse_networks([OURS])[0].create(32, 32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = benchmark_steps._TrainingStep(model, optimizer, torch.randn(2, 3, 32, 32), precision)
        for _ in range(2):
            step()
        if captured:
            step.capture()  # a step more, before it
        for _ in range(2 + (not captured)):
            step()
        weights.append([p.detach().clone() for p in model.parameters()])
    (recorder,) = recorders
    assert recorder.events == ["warm-up", "capture", "replay", "replay"]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_captured_inference_is_the_inference(monkeypatch):
    monkeypatch.setattr(graphs, "recorder_for", lambda device: CpuRecorder())
    step = benchmark_steps._Step(parse_networks([OURS])[0].create(32, 32).eval(), torch.randn(2, 3, 32, 32), "fp32")
    expected = step()
    with torch.inference_mode():  # the recorder changes results in place
        step.capture()
        assert torch.equal(step(), expected)


def test_what_a_gpu_did_has_columns(monkeypatch):
    """And only there."""

    class Work:
        launches, busy = 917, 0.03

    monkeypatch.setattr(benchmark_steps, "profile_device", lambda step, steps: Work)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    report = run(OURS)
    result = report.groups[0].results[0]
    assert "launches" not in models_text(report)
    benchmark_steps._profile_step(lambda: None, result)
    result.seconds = [0.04, 0.05, 0.06]
    assert result.host_seconds < 0.01
    header, row = [line.split() for line in models_group(report, report.groups[0]).splitlines()[1:3]]
    assert "launches" in header
    assert "917" in row
    assert "30.00" in row  # GPU ms
    assert result.busy_share == pytest.approx(0.6)


def test_executions_apart():
    """Fewer networks in memory at a time; ratios are of the same execution."""
    plan = small_plan(OURS, "test_vit", executions=["eager", "compile"], modes=["training", "inference"])
    assert [len(group) for group in plan.groups()] == [4, 4]
    plan.by_execution = True
    groups = [[(network.name, s.mode, s.execution) for network, s in group] for group in plan.groups()]
    assert [len(group) for group in groups] == [2] * 4
    assert [group[0][1:] for group in groups] == [
        ("training", "eager"), ("inference", "eager"), ("training", "compile"), ("inference", "compile"),
    ]  # fmt: skip


def test_a_limit_of_time_leaves_rows_that_say_so(monkeypatch):
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(benchmark_models.time, "monotonic", clock)
    report = run(OURS, "test_vit", modes=["training", "inference"], rounds=50, minutes=0.1)
    first, second = report.groups
    assert 0 < len(first.results[0].seconds) < 50
    assert all(result.error == "0.1 minutes were over" for result in second.results)
    assert "not measured: test_vit, NCHW, eager: 0.1 minutes were over" in models_text(report)
    assert report.complete
    with pytest.raises(SystemExit):
        script(monkeypatch, "models", "test_vit", "--minutes", "0")


def test_what_fails_is_a_row_and_the_others_go_on():
    report = run(FIXED, OURS)
    failed, measured = report.groups[0].results
    assert "32" in failed.error
    assert not failed.seconds
    assert len(measured.seconds) == 2
    text = models_text(report)
    assert f"not measured: {FIXED}, nchw, eager: {failed.error}".lower() in text.lower()
    assert failed.error in models_markdown(report, None)


def test_what_would_crash_the_process_is_not_measured(monkeypatch):
    monkeypatch.setattr(benchmark_steps, "overwriting_convolution", lambda model: "stem.conv")
    (group,) = run("test_vit", modes=["training"], memory_formats=["nchw", "channels_last"]).groups
    expected = {"nchw": None, "channels_last": "PyTorch crashes in the gradient of stem.conv; measure it in nchw"}
    assert {result.setting.memory_format: result.error for result in group.results} == expected


def test_a_failure_while_timing(monkeypatch):
    def read(clock) -> float:
        if clock.result.network == "test_vit" and clock.seconds:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte\nmore")
        return 1.0

    monkeypatch.setattr(benchmark_steps.Clock, "read", read)
    failed, measured = run("test_vit", OURS, rounds=3).groups[0].results
    assert failed.error == "out of memory"
    assert (failed.seconds, measured.seconds) == ([1.0], [1.0] * 3)


def test_an_interrupted_measurement_keeps_what_it_has(monkeypatch):
    def read(clock) -> float:
        if len(clock.seconds) == 1:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(benchmark_steps.Clock, "read", read)
    report = run(OURS, rounds=5)
    assert report.interrupted
    assert report.groups[0].results[0].seconds == [1.0]
    assert "interrupted: some rounds are missing" in models_text(report)


# --------------------------------------------------------------------------------------------------------- the script


def test_the_script_writes_everything(monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    put_section("growth", "what was there", page)
    words = [
        "models",
        "test_vit",
        OURS,
        "--train",
        "--size",
        "32",
        "--batch-size",
        "2",
        "--rounds",
        "1",
        "--steps",
        "1",
    ]
    words += ["--json", tmp_path / "a.json", "--chart", tmp_path / "a.png", "--markdown", page]
    for _ in range(2):  # the second run replaces its own section
        script(monkeypatch, *words)
    out = capsys.readouterr().out
    assert "held MB/image" in out
    results = json.loads((tmp_path / "a.json").read_text())["groups"][0]["results"]
    assert [result["network"] for result in results] == ["test_vit", OURS]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.count("## Networks side by side") == text.count("what was there") == text.count("# Benchmarks\n") == 1
    assert "python scripts/benchmark.py models test_vit" in text
    assert "(a.png)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models", "test_vlt"], "error: these networks cannot be measured"),
        (["models", "test_vit", "--execution", "cudagraph"], "error: --execution cudagraph: for a GPU only"),
        (["models", "test_vit", "--size", "0"], "argument --size: invalid"),
        (["models", "test_vit", "--sizes", "1"], "unrecognized arguments: --sizes 1"),
        (["models", "test_vit", "--chart", "a.txt"], "error: a.txt: a chart's name ends with .png"),
        (["models", FIXED, "--size", "32", "--rounds", "1"], "error: nothing could be measured; the reasons are above"),
        (["loop", "model.nane=x"], "unknown key"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_message(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        script(monkeypatch, *words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count(message) == 1


def test_no_gpu():
    with pytest.raises(ConfigError, match="--device cuda: torch sees no GPU"):
        Plan(parse_networks(["test_vit"]), torch.device("cuda")).check()


def test_outputs_are_checked_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        check_outputs(tmp_path / "file" / "a.json", None, None)
