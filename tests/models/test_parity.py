"""Values and gradients of the authors' implementation, in float64."""

from __future__ import annotations

import json

import pytest
import torch

from conv2former import Conv2Former, Conv2FormerBlock
from conv2former.weights.contents import native_state_dict

from ..conftest import Fixture

RTOL = 1e-10


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < RTOL, f"{what}: relative error {error:.2e}"


@pytest.fixture(params=["block_k7", "block_k11"])
def block(request) -> tuple[Conv2FormerBlock, Fixture]:
    fixture = Fixture(request.param)
    block = Conv2FormerBlock(int(fixture.metadata["dim"]), int(fixture.metadata["kernel_size"])).double()
    block.load_state_dict(fixture.below("state_dict/"))
    return block, fixture


@pytest.fixture(params=["model_k7", "model_k11"])
def model(request) -> tuple[Conv2Former, Fixture]:
    fixture = Fixture(request.param)
    shape = {key: json.loads(value) for key, value in fixture.metadata.items()}
    model = Conv2Former(**shape).double()
    model.load_state_dict(fixture.below("state_dict/"))
    return model, fixture


def check_gradients(module, fixture: Fixture, prefix: str) -> None:
    expected = native_state_dict(fixture.below(prefix))
    actual = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_block(block, memory_format):
    block, fixture = block
    x = fixture["input"].contiguous(memory_format=memory_format).requires_grad_()
    out = block.to(memory_format=memory_format)(x)
    assert_close(out, fixture["output"])
    (0.5 * out.square().sum()).backward()
    assert_close(x.grad, fixture["grad_input"])
    check_gradients(block, fixture, "grad/")


def test_model_in_eval_mode(model):
    model, fixture = model
    model.eval()
    features, stages = model.forward_intermediates(fixture["input"])
    for i, stage in enumerate(stages):
        assert_close(stage, fixture[f"eval/stage{i}"], f"stage {i}")
    assert_close(model.forward_head(features, pre_logits=True), fixture["eval/pre_logits"])
    assert_close(model(fixture["input"]), fixture["eval/logits"])


def test_model_in_train_mode(model):
    model, fixture = model
    model.train()
    x = fixture["input"].clone().requires_grad_()
    logits = model(x)
    assert_close(logits, fixture["train/logits"])
    (0.5 * logits.square().sum()).backward()
    assert_close(x.grad, fixture["train/grad_input"])
    check_gradients(model, fixture, "train/grad/")
