"""Blocks compiled one by one against the same blocks as they are, in eager mode."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from conv2former import Conv2FormerBlock, UserError
from conv2former.models import compiled
from conv2former.models.backbone import Conv2Former, Stage
from conv2former.models.compiled import compile_blocks
from conv2former.ops.cpu import native
from conv2former.tools.benchmark.memory import bytes_held

DEPTHS = {"n": (2, 2, 8, 2), "t": (3, 3, 12, 3)}


@pytest.fixture(autouse=True)
def nothing_compiled_before(caplog):
    torch._dynamo.reset()
    caplog.set_level(logging.INFO, "torch.__trace")  # kept by pytest, it takes half of the time
    compiled._programs.cache_clear()


class Programs:
    """A backend of torch.compile that counts the programs it is given and runs them as they are.

    Args:
        name: `eager`, or `aot_eager` to derive the backward programs, too, and with them what is saved.
    """

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def __call__(self, program, inputs):
        self.count += 1
        return torch._dynamo.lookup_backend(self.name)(program, inputs)


@pytest.fixture
def programs() -> Programs:
    return Programs("eager")


def make_network(depths=(1, 2, 2, 1), **options) -> Conv2Former:
    torch.manual_seed(0)
    options = {"ls_init_value": 0.5, "drop_path_rate": 0.3, "kernel_size": 5, "head_hidden_size": 16, **options}
    network = Conv2Former(num_classes=3, dims=(8, 16, 24, 40), depths=depths, **options)
    return network.to(memory_format=torch.channels_last).train()


def make_stage(**options) -> Stage:
    """A downsampling and two blocks, the second with more drop path."""
    return make_network(**options).stages[1]


def make_maps(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(4, 8, 12, 14, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last)


def blocks_of(network: nn.Module) -> list[Conv2FormerBlock]:
    return [module for module in network.modules() if isinstance(module, Conv2FormerBlock)]


def make_images(size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def step(network: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Returns the result of a training step and the gradients of the images and of all parameters."""
    x = x.clone().requires_grad_()
    network.zero_grad()
    torch.manual_seed(2)  # of drop path
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = network(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in network.parameters())]


def worst(ours: list[Tensor], reference: list[Tensor]) -> float:
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(ours, reference, strict=True)
    )


@pytest.mark.parametrize(
    ("variant", "autocast", "options"),
    [
        ("n", None, {}),
        ("t", None, {}),
        ("t", torch.bfloat16, {}),
        ("n", torch.bfloat16, {"ls_init_value": None}),
        ("n", torch.bfloat16, {"fused": False}),
        ("n", None, {"fusion": "sum"}),
        ("n", torch.bfloat16, {"norm_layer": "batchnorm2d"}),
    ],
    ids=str,
)
def test_four_programs(variant, autocast, options, programs):
    """Whatever the depth, though drop path differs from block to block, and with an evaluation between."""
    network = make_network(DEPTHS[variant], **options)
    average = ModelEmaV3(network)
    compile_blocks(blocks_of(network), programs)
    for _ in range(2):
        step(network, make_images(), autocast)
        average.update(network)
        for evaluated in (network, average):
            with torch.no_grad():
                evaluated.eval()(make_images())
        network.train()
    assert programs.count == 4


def test_four_programs_for_each_size(programs):
    network = make_network()
    compile_blocks(blocks_of(network), programs)
    for size, count in ((64, 4), (96, 8), (128, 12), (64, 12), (128, 12)):
        step(network, make_images(size))
        assert programs.count == count


def test_the_first_of_two_networks_compiles_for_both(programs):
    for options in ({}, {"drop_path_rate": 0.0}):
        network = make_network(**options)
        compile_blocks(blocks_of(network), programs)
        step(network, make_images())
        assert programs.count == 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ls_init_value": None},
        {"recompute": False},
        {"fused": False},
        {"output_stride": 16},
        {"norm_layer": "batchnorm2d"},
    ],
    ids=str,
)
def test_values_gradients_and_draws(options):
    stage, x = make_stage(**options).double(), make_maps(torch.float64)
    expected = step(stage, x)
    backend = Programs("aot_eager")
    compile_blocks(blocks_of(stage), backend)
    ours = step(stage, x)
    assert backend.count == 1
    assert worst(ours, expected) < 1e-10


def test_without_native_functions(monkeypatch):
    """The compiler is given the formula."""
    monkeypatch.setenv("CONV2FORMER_COMPILE", "0")
    test_values_gradients_and_draws({})


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_rounding(autocast):
    """No worse than that of the modules in the same type."""
    stage = make_stage(drop_path_rate=0.0)
    exact = step(copy.deepcopy(stage).double(), make_maps().double())
    bound = 1.5 * worst(step(make_stage(drop_path_rate=0.0, fused=False), make_maps(), autocast), exact)
    compile_blocks(blocks_of(stage), Programs("aot_eager"))
    assert worst(step(stage, make_maps(), autocast), exact) < bound


@pytest.mark.parametrize(("autocast", "most"), [(None, 1.1), (torch.bfloat16, 1.05)], ids=str)
def test_memory_stays_at_that_of_eager_mode(autocast, most):
    if not native.usable(torch.float32):
        pytest.skip("no C++ compiler")
    eager, network, plain = make_network(), make_network(), make_network(fused=False)
    compile_blocks(blocks_of(network), Programs("aot_eager"))
    held, ours, plain_held = (bytes_held(n, make_images(), autocast) for n in (eager, network, plain))
    assert plain_held > 1.6 * held  # so there is something to lose
    assert held < ours < most * held  # with less, matrix products would be computed again


def test_torchs_advice_on_checkpoints_is_not_printed(programs):
    compile_blocks([], programs)
    logger = logging.getLogger("torch._higher_order_ops.wrap")
    shown = [
        logger.filter(logging.makeLogRecord({"msg": text})) for text in ("Detected that context_fn is passed", "other")
    ]
    assert [bool(show) for show in shown] == [False, True]


def test_memory_format():
    block = Conv2FormerBlock(8, 5).train()
    compile_blocks([block], Programs("aot_eager"))
    x = torch.randn(2, 8, 6, 7).to(memory_format=torch.channels_last).requires_grad_()
    y = block(x)
    y.square().sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_network_is_a_network(programs):
    """It can be copied, pickled, loaded, and compiled in one piece."""
    network = make_network(drop_path_rate=0.0)
    before = list(network.state_dict())
    expected = step(network, make_images())[0]
    compile_blocks(blocks_of(network), "eager")
    assert list(network.state_dict()) == before
    make_network().load_state_dict(network.state_dict())
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.allclose(step(other, make_images())[0], expected, atol=1e-5)
    compile_blocks(blocks_of(network), programs)
    whole = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.allclose(whole(make_images()), expected, atol=1e-5)
    assert programs.count == 0


def test_in_evaluation_blocks_run_as_they_are(programs):
    network = make_network()
    compile_blocks(blocks_of(network), programs)
    with torch.no_grad():
        network(make_images())
    network.eval()(make_images()).sum().backward()
    assert programs.count == 0


def test_export_and_torchscript(monkeypatch):
    """Of a stage in training mode, in which its blocks are compiled."""

    def never(block, x):
        raise AssertionError("compiled")

    stage, x = make_stage(drop_path_rate=0.0), make_maps()
    expected = stage(x)
    compile_blocks(blocks_of(stage))
    monkeypatch.setattr(compiled, "_forward", never)
    exported = [torch.export.export(stage, (x,), strict=strict).module() for strict in (False, True)]
    for other in (*exported, torch.jit.script(stage), torch.jit.trace(stage, x, check_trace=False)):
        assert torch.allclose(other(x), expected, atol=1e-5)


def test_hooks_and_exchanged_layers(programs):
    stage, seen = make_stage(), []
    stage.blocks[0].attn.a.register_forward_hook(lambda *_: seen.append(1))
    stage.blocks[1].mlp.act = nn.ReLU()
    expected = step(stage, make_maps())
    compile_blocks(blocks_of(stage), programs)
    assert worst(step(stage, make_maps()), expected) < 1e-4
    assert len(seen) == 2


def test_checkpointing_of_whole_blocks():
    stage = make_stage()
    expected = step(stage, make_maps())
    compile_blocks(blocks_of(stage), Programs("aot_eager"))
    stage.grad_checkpointing = True
    assert worst(step(stage, make_maps()), expected) < 1e-4


def test_a_program_that_cannot_be_compiled():
    def failing(program, inputs):
        raise RuntimeError("No working C++ compiler found\nand more")

    network = make_network()
    compile_blocks(blocks_of(network), failing)
    with pytest.raises(UserError) as error:
        step(network, make_images())
    assert str(error.value) == (
        "torch.compile cannot compile the network's blocks here (No working C++ compiler found): "
        "set train.compile: false"
    )


def test_no_torch_compile_at_all(monkeypatch):
    def absent(*args, **options):
        raise RuntimeError("torch.compile is not supported on Python 4.0+")

    monkeypatch.setattr(torch, "compile", absent)
    network = make_network()
    with pytest.raises(UserError, match=r"not supported on Python 4\.0\+\): set train\.compile: false"):
        compile_blocks(blocks_of(network))
    assert not any(block.compiled for block in blocks_of(network))


@pytest.mark.slow
def test_with_code_generation():
    """Through torch.compile's own backend."""
    stage = make_stage()
    expected = step(stage, make_maps())
    compile_blocks(blocks_of(stage))
    assert worst(step(stage, make_maps()), expected) < 1e-5
