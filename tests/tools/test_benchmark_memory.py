"""Kept bytes against cases that are computed by hand, and against the known figures of a peer."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conv2former.tools.benchmark.memory import bytes_held, peak_bytes


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 5))


class Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inside, x, use_reentrant=False, preserve_rng_state=False)


class KeepsAside(torch.autograd.Function):
    """Keeps memory that no hook on saved tensors sees."""

    @staticmethod
    def forward(ctx, x):
        ctx.aside = torch.ones(1000)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        # the batch, the input of the GELU, its output, and the output of the network
        (None, 4 * 10 * 4 + 4 * 20 * 4 + 4 * 20 * 4 + 4 * 5 * 4),
        # the same in two bytes, and autocast's copy of the second weight, which the gradient of its input needs
        (torch.bfloat16, 4 * 10 * 2 + 4 * 20 * 2 + 4 * 20 * 2 + 4 * 5 * 2 + 20 * 5 * 2),
    ],
)
def test_an_mlp_by_hand(dtype, expected):
    assert bytes_held(mlp(), torch.randn(4, 10), dtype) == expected


def test_a_checkpointed_region_keeps_its_input_and_output_only():
    assert bytes_held(Checkpointed(mlp()), torch.randn(4, 10)) == 4 * 10 * 4 + 4 * 5 * 4


def test_what_an_autograd_function_keeps_aside_is_counted():
    class Network(nn.Linear):
        def forward(self, x):
            return KeepsAside.apply(super().forward(x))

    assert bytes_held(Network(10, 20), torch.randn(4, 10)) == 4 * 10 * 4 + 4 * 20 * 4 + 1000 * 4


def test_the_batch_counts_only_where_the_graph_keeps_it():
    images = torch.randn(2, 8, 16, 16)
    assert bytes_held(nn.ReLU(), images) == images.numel() * 4  # the output, which nothing is needed for
    assert bytes_held(nn.Conv2d(8, 4, 1), images) == images.numel() * 4 + 2 * 4 * 16 * 16 * 4


def test_network_and_caller_are_left_as_they_were():
    model = nn.Sequential(mlp(), nn.Dropout(0.5)).eval()
    kept = model(torch.randn(4, 10))  # alive all the time: must not count
    first = bytes_held(model, torch.randn(4, 10))
    assert first == bytes_held(mlp(), torch.randn(4, 10)) + 4 * 5 * 4  # training mode: the mask
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    del kept
    with torch.no_grad():
        assert bytes_held(model, torch.randn(4, 10)) == first


@pytest.mark.slow
def test_the_known_figures_of_a_peer():
    """MB per image of timm's convnext_tiny at 224 pixels, as the benchmark's convention has them."""
    model = timm.create_model("convnext_tiny")
    images = torch.randn(2, 3, 224, 224)
    held = [bytes_held(model, images, dtype) / 2e6 for dtype in (None, torch.bfloat16)]
    assert [round(value, 1) for value in held] == [109.2, 84.2]


def test_the_peak_is_the_most_at_one_time():
    def action() -> torch.Tensor:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        third = torch.empty(250, dtype=torch.uint8)
        del second
        return third

    assert peak_bytes(action, torch.device("cpu")) == 1500
    assert peak_bytes(lambda: None, torch.device("cpu")) == 0
