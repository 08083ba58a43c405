"""Functions that are captured, and networks captured for inference. torch.cuda has a stand-in."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from contextlib import contextmanager, suppress

import pytest
import timm
import torch
from torch import nn

import conv2former
from conv2former.graphs import CudaRecorder, Graph, Places, can_capture, copied, recorder_for
from conv2former.inference import Captured

from .graphs_on_cpu import CpuRecorder, capture_with

CPU = torch.device("cpu")


def test_a_graph_takes_what_it_was_captured_with():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    recorder = CpuRecorder()
    graph = Graph(recorder, lambda x, y: x * 2 + y, x, torch.zeros(5))
    y = torch.arange(5.0)
    result = graph(x, y)
    assert torch.equal(result, x * 2 + y)
    assert graph(x + 1, y) is result  # the same memory
    assert torch.equal(result, (x + 1) * 2 + y)
    for wrong in (x[:1], x.double(), x.contiguous()):
        with pytest.raises(ValueError, match="input 0 of a graph must be "):
            graph(wrong, y)
    with pytest.raises(ValueError, match="input 1 of a graph must be "):
        graph(x, y[:1])
    graph.reset()
    with pytest.raises(RuntimeError, match="after its reset"):
        graph()
    assert recorder.events == ["capture", "replay", "replay", "reset"]


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        (lambda m: None, False),
        (lambda m: m[0].weight.data.mul_(2), False),
        (lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}), False),
        (lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True), True),
        (lambda m: m.double(), True),
        (lambda m: setattr(m[0], "bias", nn.Parameter(torch.zeros(4))), True),
        (lambda m: setattr(m[0], "bias", None), True),
        (lambda m: setattr(m[1], "running_mean", torch.zeros(4)), True),
        (lambda m: m.__setitem__(0, nn.Linear(4, 4)), True),
    ],
)
def test_places_of_weights(change, moves):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    places = Places(model)
    change(model)
    assert places.hold() is not moves


def test_copies():
    a, b = torch.ones(2), torch.zeros(3)
    assert copied(a) is not a
    tensor, (first, *_) = copied((a, [b]))
    assert torch.equal(tensor, a)
    assert first.data_ptr() != b.data_ptr()


# ------------------------------------------------------------------------------------------------------ inference


@pytest.fixture
def recorders(monkeypatch) -> list[CpuRecorder]:
    """All that capture since."""
    made: list[CpuRecorder] = []

    capture_with(monkeypatch, lambda: made.append(CpuRecorder()) or made[-1])
    return made


@pytest.fixture
def network(tiny):
    torch.manual_seed(0)
    return timm.create_model(tiny, num_classes=3).eval()


def plain(model, images):
    with torch.inference_mode():
        return model(images)


def test_where_graphs_are(monkeypatch):
    assert can_capture(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert not can_capture(torch.device("cuda"))
    assert recorder_for(torch.device("cuda")) is None


def test_without_a_gpu_it_is_a_plain_call(network):
    assert recorder_for(CPU) is None
    x = torch.randn(2, 3, 32, 32)
    serve = conv2former.capture(network, x)
    assert torch.equal(serve(x), plain(network, x))
    assert serve(x).is_inference()
    assert conv2former.capture(network, dtype=torch.bfloat16)(x).dtype == torch.bfloat16


def test_serving(network, recorders):
    x = torch.randn(2, 3, 32, 32)
    serve = conv2former.capture(network, x)
    (recorder,) = recorders
    assert recorder.events == ["warm-up", "warm-up", "capture", "replay"]
    first, second = serve(x), serve(x + 1)
    assert torch.equal(first, plain(network, x))  # not overwritten by the second
    assert torch.equal(second, plain(network, x + 1))
    kept = serve(x, copy=False)
    assert serve(x + 1, copy=False) is kept
    with torch.no_grad():
        network.head.fc.bias += 1  # seen without a new capture
    assert torch.equal(serve(x), plain(network, x))
    assert recorder.events.count("capture") == 1


def test_autocast_is_an_argument(network, recorders):
    x = torch.randn(2, 3, 32, 32)
    serve = conv2former.capture(network, x, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(network, x)
        assert conv2former.capture(network, x)(x).dtype == torch.float32  # that of the weights
    assert torch.equal(serve(x), expected)
    assert expected.dtype == torch.bfloat16


def test_no_cast_weights_are_kept(network, recorders):
    """An autocast around the calls would free them at its end, and a graph would go on to read them."""
    seen = []
    network.stem.register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu"):
        conv2former.capture(network, torch.randn(1, 3, 32, 32), dtype=torch.bfloat16)
    assert seen
    assert not any(seen)


def test_replaced_weights_are_captured_anew(network, recorders):
    x = torch.randn(2, 3, 32, 32)
    serve = conv2former.capture(network, x)
    state = {key: value + 0.01 if value.is_floating_point() else value for key, value in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    for _ in range(4):
        assert torch.equal(serve(x), plain(network, x))
    assert recorders[0].events[-2:] == ["reset", "close"]
    assert recorders[1].events == ["warm-up", "warm-up", "capture", "replay", "replay"]


def test_shapes_beyond_the_bound_are_plain_calls(network, recorders):
    """Those that come seldom take no place of the four."""
    serve = conv2former.capture(network)
    for size, times in [(64, 1), (96, 2), (32, 4), (48, 4), (80, 4), (112, 4), (128, 4)]:
        x = torch.randn(1, 3, size, size)
        for _ in range(times):
            assert torch.equal(serve(x), plain(network, x))
    assert recorders[0].events == ["warm-up"] * 3 + (["warm-up"] * 2 + ["capture"] + ["replay"] * 2) * 4


def test_after_a_capture_elsewhere_has_broken_calls_are_plain(network, recorders):
    x = torch.randn(1, 3, 32, 32)
    serve = conv2former.capture(network, x)
    recorders[0].broken = "an earlier capture failed: launch failure"
    assert torch.equal(serve(x), plain(network, x))
    assert recorders[0].events[-1] == "replay"
    assert recorders[0].events.count("replay") == 1


def test_a_capture_that_fails_is_a_warning(network, recorders, caplog):
    x = torch.randn(2, 3, 32, 32)
    serve = conv2former.capture(network)
    serve(x)
    recorders[0].fails = RuntimeError("operation not permitted when stream is capturing\nmore")
    for _ in range(4):
        assert torch.equal(serve(x), plain(network, x))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == [
        "no CUDA graph: operation not permitted when stream is capturing; the network is called plainly, "
        "with the same results"
    ]


def test_training_mode(network, recorders):
    with pytest.raises(ValueError, match=r"call model\.eval"):
        conv2former.capture(network.train())
    serve = conv2former.capture(network.eval(), torch.randn(2, 3, 32, 32))
    network.train()
    before = network.stem.norm1.num_batches_tracked.clone()
    serve(torch.randn(2, 3, 32, 32))
    assert network.stem.norm1.num_batches_tracked == before + 1  # a plain call
    assert recorders[0].events[-1] == "replay"


def test_lists_of_maps(tiny, recorders):
    model = timm.create_model(tiny, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    serve = conv2former.capture(model, x)
    for ours, theirs in zip(serve(x), plain(model, x), strict=True):
        assert torch.equal(ours, theirs)


def test_threads_wait_for_each_other(network, recorders):
    images = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    expected = [plain(network, x) for x in images]
    serve = conv2former.capture(network, images[0])
    wrong = []

    def ask(x, answer):
        wrong.extend(i for i in range(20) if not torch.equal(serve(x), answer))

    threads = [threading.Thread(target=ask, args=pair) for pair in zip(images, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_given_up_at_the_end(network, recorders):
    x = torch.randn(1, 3, 32, 32)
    with Captured(network, lambda: torch.autocast("cpu", enabled=False)) as answer:
        for _ in range(3):
            answer(x)
    assert recorders[0].events[-3:] == ["replay", "reset", "close"]
    with Captured(network, lambda: torch.autocast("cpu", enabled=False), enabled=False) as answer:
        for _ in range(3):
            answer(x)
    assert len(recorders) == 1


# ----------------------------------------------------------------------------------------- what is said to torch.cuda


class Cuda:
    """Stands for torch.cuda: notes which stream is current when something is done, and in which order."""

    def __init__(self, fails_at_end: bool = False) -> None:
        self.events, self.current, self.fails_at_end = [], "main", fails_at_end
        self.default_generators = [self]
        self.pools, self.free = 0, 50

    def Stream(self, device):
        return self.stream_named("side")

    def stream_named(self, name):
        cuda = self

        class Stream:
            def __str__(self):
                return name

            def wait_stream(self, other):
                cuda.events.append(f"{name} waits for {other}")

        return Stream()

    def current_stream(self, device):
        return self.stream_named(self.current)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, str(stream)
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def device(self, device):
        yield

    def mem_get_info(self, device):
        return self.free, 100

    def memory_reserved(self, device):
        return 40

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.events.append(f"begin on {stream} in {pool}")
        self.current = str(stream)
        try:
            yield
        finally:
            if self.fails_at_end:  # torch then leaves the current stream changed
                raise RuntimeError("operation failed due to a previous error during capture")
            self.events.append("end")
            self.current = "main"

    def graph_pool_handle(self):
        self.pools += 1
        return f"pool {self.pools}"

    def CUDAGraph(self):
        class OneGraph:
            replay = staticmethod(lambda: self.events.append("replay"))
            reset = staticmethod(lambda: self.events.append("reset"))

        return OneGraph()

    def get_rng_state(self, device):
        return "state of before"

    def graphsafe_set_state(self, state):
        self.events.append(f"generator with {state}")

    def current_device(self):
        return 0

    def empty_cache(self):
        self.events.append("empty cache")


class Generator:
    """Stands for torch.Generator, of which a CPU's has no state that can be exchanged."""

    def __init__(self, device):
        self.state = "fresh state"

    def set_state(self, state):
        self.state = f"fresh {state}"

    def graphsafe_get_state(self):
        return self.state


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(CudaRecorder, "broken", "")
    monkeypatch.setattr(CudaRecorder, "_failed", [])

    def replace(**how) -> Cuda:
        monkeypatch.setattr(torch, "cuda", Cuda(**how))
        return torch.cuda

    yield replace
    monkeypatch.undo()


def test_cuda_is_asked_in_order(cuda):
    cuda = cuda()
    recorder = CudaRecorder(CPU)
    assert recorder.warm_up(lambda: cuda.events.append(f"run on {cuda.current}") or 5) == 5
    recording = recorder.capture(lambda: cuda.events.append(f"run on {cuda.current}") or 6)
    recording.replay()
    recording.reset()
    recorder.close()
    assert recording.result == 6
    assert cuda.events == [
        "side waits for main", "run on side", "main waits for side", "begin on side in pool 1", "run on side", "end",
        "replay", "reset", "empty cache",
    ]  # fmt: skip
    recorder.capture(lambda: 7)
    assert cuda.events[-2:] == ["begin on side in pool 2", "end"]


def test_memory_is_short_where_less_is_free_than_in_use(cuda):
    cuda = cuda()
    assert not CudaRecorder(CPU).is_short_of_memory()
    cuda.free = 39
    assert CudaRecorder(CPU).is_short_of_memory()


def broken():
    raise ValueError("cannot be captured")


def test_a_mistake_in_what_is_captured_harms_nothing(cuda):
    cuda = cuda()
    recorder = CudaRecorder(CPU)
    with pytest.raises(ValueError, match="cannot be captured"):
        recorder.capture(broken)
    assert cuda.current == "main"
    assert recorder.capture(lambda: 6).result == 6


def test_a_mistake_keeps_no_memory(cuda):
    """What is in the frames of its traceback, such as the maps of a network, goes with the error."""
    kept = []

    def function():
        x = torch.zeros(3)
        kept.append(weakref.ref(x))
        raise ValueError

    cuda()
    recorder = CudaRecorder(CPU)
    gc.disable()
    try:
        with suppress(ValueError):
            recorder.capture(function)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_an_interrupt_stays_one(cuda):
    """Also where the capture that it has broken off cannot be ended."""
    cuda(fails_at_end=True)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CudaRecorder(CPU).capture(interrupted)


@pytest.mark.parametrize("function", [broken, lambda: 6])
def test_after_a_broken_capture_none_is_tried(cuda, function):
    """The reason is what was raised inside, the current stream and the random numbers are as before."""
    cuda = cuda(fails_at_end=True)
    recorder = CudaRecorder(CPU)
    reason = "cannot be captured" if function is broken else "due to a previous error"
    with pytest.raises((ValueError, RuntimeError), match=reason):
        recorder.capture(function)
    assert cuda.current == "main"
    assert cuda.events[-1] == "generator with fresh state of before"
    assert len(CudaRecorder._failed) == 1
    cuda.fails_at_end = False
    with pytest.raises(RuntimeError, match=f"an earlier capture failed: .*{reason}"):
        CudaRecorder(CPU).capture(lambda: 6)
