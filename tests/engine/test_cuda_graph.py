"""Training through graphs, which a stand-in captures and replays on the CPU: the same numbers, bit for bit."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from conv2former import ConfigError, _private
from conv2former.config import make_plan
from conv2former.data import Batch
from conv2former.engine import World, build, cuda_graph, distributed, dry_run, train, trainer
from conv2former.engine.build import build_run, check_names
from conv2former.engine.cuda_graph import plan_graphs
from conv2former.engine.step import FiniteCheck, train_step
from conv2former.tasks.network import build_model
from conv2former.tools.runs.comparing import differing, differing_runs

from ..graphs_on_cpu import CpuRecorder, capture_with
from .conftest import Killed, configure, killed_after
from .conftest import evaluate_classifier as evaluate
from .test_processes import run as run_processes

WORLD = World(0, 1, torch.device("cpu"))


def make_run(raw: dict, **changes):
    config = configure(raw, **changes)
    run = build_run(config, make_plan(config, 1, 44), WORLD, build_model(config, 3))
    if run.graphs:
        run.graphs.recorder.model = run.model
    return run


@pytest.fixture
def captured(monkeypatch, raw_config):
    """Makes a run that is captured, whose log lines go into `run.lines`."""

    def make(**changes):
        with monkeypatch.context() as patch:
            capture_with(patch, CpuRecorder)
            run = make_run(raw_config, **changes)
        run.lines = []
        run.graphs.say = run.lines.append
        return run

    return make


def batch(size: int, seed: int, side: int = 32):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, generator=generator)
    return Batch(images, torch.randint(3, (size,), generator=generator), [])


def windows_of(accum_steps: int, steps: int, size: int = 4):
    return [[batch(size, step * accum_steps + i) for i in range(accum_steps)] for step in range(steps)]


def after(run, windows, first: int = 0) -> dict:
    """Does steps, and returns all that a run holds then."""
    check = FiniteCheck.of(run)
    measured = []
    for step, window in enumerate(windows, first):
        copies = [Batch(x.images.clone(), x.labels, []) for x in window]  # mixup mixes in place
        result = train_step(run, copies, step, check)
        measured.append([result.loss, result.grad_norm, torch.tensor(result.lr)])
    return {
        "measured": measured,
        "model": run.model.state_dict(),
        "average": run.ema.module.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
    }


@pytest.mark.parametrize("accum_steps", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},  # drop path, dropout, mixup, clipping, average
        {"augment__mix_off_epochs": 3, "train__precision": "bf16"},  # of 4, of 5 steps each
        {"augment__mixup": 0.0, "augment__cutmix": 0.0, "optim__clip_grad": None, "model__freeze": "stage2"},
        {"train__class_weight": "balanced", "train__channels_last": False, "model__fused": False},
    ],
)
def test_the_same_steps(captured, raw_config, accum_steps, changes):
    changes = {**changes, "train__accum_steps": accum_steps}
    windows = windows_of(accum_steps, 12)
    run = captured(**changes)
    assert not differing(after(make_run(raw_config, **changes), windows), after(run, windows))
    events = run.graphs.recorder.events
    assert events == ["warm-up"] * 3 + ["capture"] + ["replay"] * (12 * accum_steps - 3)
    assert len(run.graphs.shapes) == 1
    assert not run.lines


def test_other_shapes_and_shorter_steps(captured, raw_config):
    """Growing images, batches of another size within a step, and an accumulation that an epoch's end cuts short."""
    windows = [
        *windows_of(2, 4),
        *([batch(4, 50 + i, 64), batch(2, 60 + i, 64)] for i in range(6)),
        *([batch(4, 70 + i)] for i in range(5)),
        *windows_of(2, 2),
    ]
    run = captured()
    assert not differing(after(make_run(raw_config), windows), after(run, windows))
    events = run.graphs.recorder.events
    assert len(run.graphs.shapes) == events.count("capture") == 4
    # whole batches: after the two sizes with fewer images nothing is new to them in a shorter step
    assert events.count("warm-up") == 3 + 3 + 3
    assert "reset" not in events


def test_the_shapes_used_last_are_kept(captured, raw_config, monkeypatch):
    monkeypatch.setattr(cuda_graph, "SHAPES", 2)
    windows = [[batch(size, 10 * i + size)] for size in (4, 2, 4, 6, 4, 2) for i in range(5)]
    run = captured()
    assert not differing(after(make_run(raw_config), windows), after(run, windows))
    first, again = ["warm-up"] * 3 + ["capture"] + ["replay"] * 2, ["replay"] * 5
    expected = [*first, *first, *again, *first[:4], "reset", *first[4:], *again, "capture", "reset", *again]
    assert run.graphs.recorder.events == expected
    assert len(run.graphs.shapes) == 3


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_graphs_make_room_for_what_has_none(captured, raw_config, accum_steps):
    """For another size of images and for evaluations, but only where memory is short."""
    changes = {"train__accum_steps": accum_steps}
    windows = windows_of(accum_steps, 5)
    windows[4][-1] = batch(2, 99)
    for is_short in (False, True):
        plain, run = make_run(raw_config, **changes), captured(**changes)
        run.graphs.recorder.is_short = is_short
        assert not differing(after(plain, windows), after(run, windows))
        events = run.graphs.recorder.events
        assert events.count("reset") == events.count("close") == is_short
        events.clear()
        assert not differing(after(plain, windows[:2], 5), after(run, windows[:2], 5))
        assert events[0] == ("capture" if is_short else "replay")
        run.graphs.make_room()
        assert ("reset" in events) == is_short
        assert all(p.grad is None for p in run.parameters) == is_short
        assert not differing(after(plain, windows[:2], 7), after(run, windows[:2], 7))


def test_several_processes_keep_their_graphs(captured):
    run = captured(train__accum_steps=1)
    after(run, windows_of(1, 4))
    run.graphs._alone, run.graphs.recorder.is_short = False, True
    run.graphs.make_room()
    after(run, windows_of(1, 1, size=2), 4)
    assert "reset" not in run.graphs.recorder.events


def test_a_capture_that_broke_elsewhere_ends_graphs(captured, raw_config):
    """They would draw random numbers from a state that nobody seeds any more."""
    results = []
    for run in (make_run(raw_config), captured()):
        first = after(run, windows_of(2, 4))
        if run.graphs:
            run.graphs.recorder.broken = "an earlier capture failed: launch failure"
        results.append([first, after(run, windows_of(2, 4), 4)])
    assert not differing(*results)
    assert run.graphs.recorder.events[-2:] == ["reset", "close"]
    (line,) = run.lines
    assert line.startswith("warning: CUDA graphs: an earlier capture failed: launch failure; the run goes on without")


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_an_overflow_in_fp16(captured, raw_config, accum_steps):
    """The scale is read at the replay, and what is left out leaves no trace."""
    changes = {"train__precision": "fp16", "train__accum_steps": accum_steps}
    windows = windows_of(accum_steps, 8)
    windows[5][-1].images[0, 0, 0, 0] = float("inf")
    plain, run = make_run(raw_config, **changes), captured(**changes)
    kept = after(plain, windows)
    assert not differing(kept, after(run, windows))
    assert kept["scaler"]["scale"] < 65536
    assert run.graphs.recorder.events.count("replay") > accum_steps


def test_an_evaluation_in_between(captured, raw_config):
    results = []
    for run in (make_run(raw_config), captured()):
        first = after(run, windows_of(2, 4))
        run.model.eval()
        with torch.inference_mode():
            logits = run.model(batch(5, 99).images)
        results.append([first, logits, after(run, windows_of(2, 4), 4)])
    assert not differing(*results)


def test_a_capture_that_fails_loses_nothing(captured, raw_config):
    """Also where gradients of the step are there already: here in the second of three microbatches."""
    windows = windows_of(3, 6)
    run = captured(train__accum_steps=3)
    first = after(run, windows[:1])
    run.graphs.recorder.fails = RuntimeError("CUDA error: operation not permitted\nCompile with ...")
    plain = make_run(raw_config, train__accum_steps=3)
    assert not differing(after(plain, windows[:1]), first)
    assert not differing(after(plain, windows[1:], 1), after(run, windows[1:], 1))
    assert run.graphs.recorder.events == ["warm-up"] * 3 + ["capture", "close"]
    assert run.lines == [
        "warning: CUDA graphs: CUDA error: operation not permitted; the run goes on without, with the same results"
    ]


def test_where_it_must_be_a_failure_is_an_error(captured):
    run = captured()
    run.graphs._required = True
    run.graphs.recorder.fails = RuntimeError("CUDA error: out of memory")
    with pytest.raises(ConfigError, match=r"train.cuda_graph: on, but .*: CUDA error: out of memory\. Set it to auto"):
        after(run, windows_of(2, 4))


def test_weights_that_move_are_noticed(captured, raw_config):
    results = []
    for run in (make_run(raw_config), captured()):
        first = after(run, windows_of(2, 4))
        weight = run.model.stages[2].blocks[1].mlp.fc1.weight
        weight.data = weight.data.clone()
        results.append([first, after(run, windows_of(2, 4), 4)])
    assert not differing(*results)
    assert "has put weights elsewhere" in run.lines[-1]
    assert run.graphs.recorder.events[-2:] == ["reset", "close"]


@pytest.mark.parametrize(
    ("changes", "size", "hook", "expected"),
    [
        ({}, 1, False, "after 3 batches of a shape its forward"),
        ({"train__cuda_graph": "on"}, 1, False, "after 3 batches of a shape its forward"),
        ({"train__cuda_graph": "off"}, 1, False, r"off \(train.cuda_graph\)"),
        ({"model__grad_checkpointing": True}, 1, False, "not used: gradient checkpointing"),
        ({}, 2, False, "not used: several processes exchange"),
        ({"train__accum_steps": 1}, 2, False, "after 11 batches of a shape its forward"),
        ({"train__compile": True}, 1, False, "after 3 batches of a shape its forward"),
        ({}, 1, True, "not used: a layer has hooks"),
    ],
)
def test_what_can_be_captured(raw_config, monkeypatch, changes, size, hook, expected):
    capture_with(monkeypatch, CpuRecorder)
    config = configure(raw_config, **changes)
    model = build_model(config, 3)
    if hook:
        model.stem.register_forward_hook(lambda *_: None)
    made, line = plan_graphs(config, World(0, size, WORLD.device), model)
    assert re.match(f"CUDA graphs: .*{expected}", line)
    assert (made is not None) == expected.startswith("after")


def test_what_must_be_captured(raw_config, monkeypatch):
    capture_with(monkeypatch, CpuRecorder)
    config = configure(raw_config, train__cuda_graph="on")
    with pytest.raises(ConfigError, match=r"train.cuda_graph: on, but several processes .*; set it to auto or off"):
        plan_graphs(config, World(0, 2, WORLD.device), build_model(config, 3))


def test_the_network_is_wrapped_where_it_is_captured(raw_config, monkeypatch):
    """So that autograd adds gradients there: DDP keeps the nodes that do."""
    recorder = CpuRecorder()
    capture_with(monkeypatch, lambda: recorder)
    wrapped = lambda model, **_: recorder.events.append("wrapped") or model  # noqa: E731
    monkeypatch.setattr(distributed, "DistributedDataParallel", wrapped)
    config = configure(raw_config, train__cuda_graph="on", train__accum_steps=1)
    build_run(config, make_plan(config, 2, 44), World(0, 2, WORLD.device), build_model(config, 3))
    assert recorder.events == ["warm-up", "wrapped"]


def test_on_needs_a_gpu(raw_config):
    with pytest.raises(ConfigError, match=r"train\.cuda_graph: on needs an NVIDIA GPU, and torch sees none here"):
        check_names(configure(raw_config, train__cuda_graph="on"), WORLD.device)
    with pytest.raises(ConfigError, match=r"train\.cuda_graph: not with model.grad_checkpointing"):
        configure(raw_config, train__cuda_graph="on", model__grad_checkpointing=True)
    run = make_run(raw_config)
    assert (run.graphs, run.about_graphs) == (None, "")


def test_lists_of_tensors(monkeypatch):
    for _ in range(2):  # with torch's operation, and without
        totals, more = [torch.ones(2), torch.zeros(1)], [torch.ones(2), torch.full((1,), 3.0)]
        _private.add_all(totals, more)
        assert [total.tolist() for total in totals] == [[2.0, 2.0], [3.0]]
        monkeypatch.setattr(_private.ADD_ALL, "value", None)


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def recorders(monkeypatch):
    """Makes whole runs use graphs; those of training, which know their network, are listed."""
    made: list[CpuRecorder] = []
    real = build.plan_graphs

    def plan(config, world, model):
        found = real(config, world, model)
        if found[0]:
            found[0].recorder.model = model
            made.append(found[0].recorder)
        return found

    capture_with(monkeypatch, CpuRecorder)
    monkeypatch.setattr(build, "plan_graphs", plan)
    return made


@pytest.mark.slow
def test_a_run_is_the_same_and_goes_on_the_same(raw_config, tmp_path, monkeypatch, recorders, capsys):
    """Evaluated in between, with shorter steps at epochs' ends and mixup off at the end; stopped after eight steps."""
    make = partial(
        configure, raw_config, train__keep_tail=True, augment__mix_off_epochs=1, checkpoint__every_steps=1,
        train__eval_batch_size=2,
    )  # fmt: skip
    report = train(make(train__cuda_graph="off"), tmp_path / "plain")
    assert report["cuda_graphs"] == 0
    assert not recorders
    assert "CUDA graphs: off (train.cuda_graph)" in capsys.readouterr().out
    report = train(make(), tmp_path / "captured")
    assert report["cuda_graphs"] == 2
    assert recorders[0].events[-3:] == ["reset", "reset", "close"]
    assert (tmp_path / "captured" / "train.log").read_text().count("CUDA graphs: after 3 batches of a shape") == 1
    assert not differing_runs(tmp_path / "plain", tmp_path / "captured")

    monkeypatch.setattr(CpuRecorder, "is_short_of_memory", lambda recorder: True)
    with killed_after(8):
        train(make(), tmp_path / "parts")
    assert recorders[1].events[-2:] == ["reset", "close"]
    assert recorders[1].events.count("close") == 2  # before the evaluation, and at the end
    train(make(train__cuda_graph="auto"), tmp_path / "parts")
    assert not differing_runs(tmp_path / "plain", tmp_path / "parts")
    assert "other kernels" not in (tmp_path / "parts" / "train.log").read_text()


@pytest.mark.slow
def test_graphs_go_before_the_process_group(raw_config, tmp_path, monkeypatch, recorders):
    real_step, real_world = trainer.train_step, trainer.join_world

    @contextmanager
    def join_world(*args):
        with real_world(*args) as world:
            try:
                yield world
            finally:
                recorders[0].events.append("group ends")

    def broken_step(run, window, step, check):
        if step == 4:
            raise Killed
        return real_step(run, window, step, check)

    monkeypatch.setattr(trainer, "join_world", join_world)
    monkeypatch.setattr(trainer, "train_step", broken_step)
    with pytest.raises(Killed):
        train(configure(raw_config), tmp_path / "run")
    assert recorders[0].events[-3:] == ["reset", "close", "group ends"]


@pytest.mark.slow
def test_a_run_may_go_on_with_or_without(raw_config, tmp_path, recorders):
    short = {"schedule__epochs": 2, "schedule__warmup_epochs": 0, "schedule__cooldown_epochs": 0}
    with killed_after(5):
        train(configure(raw_config, **short), tmp_path / "run")
    assert train(configure(raw_config, **short, train__cuda_graph="off"), tmp_path / "run")["steps"] == 10


@pytest.mark.slow
def test_two_processes_train_the_same(raw_config, tmp_path, recorders):
    """They are captured after the eleven batches that DDP needs."""
    changes = {"train__accum_steps": 1, "train__keep_tail": True}
    for mode in ("off", "on"):
        config = configure(raw_config, **changes, train__cuda_graph=mode)
        codes, output = run_processes(partial(train, config, tmp_path / mode), 2, tmp_path)
        assert set(codes) == {0}, output
    assert not differing_runs(tmp_path / "off", tmp_path / "on")
    assert json.loads((tmp_path / "on" / "report.json").read_text())["cuda_graphs"] == 1
    assert "CUDA graphs: after 11 batches of a shape" in (tmp_path / "on" / "train.log").read_text()


def test_evaluations_are_captured_and_let_go(raw_config, monkeypatch):
    made = []
    capture_with(monkeypatch, lambda: made.append(CpuRecorder()) or made[-1])
    model = build_model(configure(raw_config), 3)
    batches = [batch(4, i) for i in range(5)] + [batch(2, 6)]
    results = [
        evaluate(model, batches, WORLD, lambda: torch.autocast("cpu", enabled=False), cuda_graph=is_on)
        for is_on in (False, True)
    ]
    assert results[0].metrics == results[1].metrics
    assert torch.equal(results[0].confusion, results[1].confusion)
    (recorder,) = made
    assert recorder.events == ["warm-up"] * 2 + ["capture"] + ["replay"] * 3 + ["warm-up", "reset", "close"]


@pytest.mark.slow
def test_a_dry_run_says_so(raw_config, recorders):
    lines = dry_run(configure(raw_config, train__accum_steps=5, data__num_classes=3))
    assert any(line.startswith("CUDA graphs: after 3 batches of a shape") for line in lines)
    assert recorders[0].events[-4:] == ["replay", "replay", "reset", "close"]
