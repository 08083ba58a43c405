"""Graphs of torch.fx: timm's tracer computes the same bits, and torchvision's own reaches every layer."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import GraphExtractNet, get_graph_node_names
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

KINDS = {
    "standard": {},
    "without layer scale": {"ls_init_value": None},
    "dilated": {"output_stride": 8},
    "modules alone": {"fused": False},
    "a sum for the product": {"fusion": "sum"},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request) -> nn.Module:
    """A small network of every kind of block, with random values in all that a fresh one has constant."""
    torch.manual_seed(0)
    model = timm.create_model("conv2former_n", num_classes=7, depths=(1, 2, 2, 1), **request.param)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")):
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def test_timms_trace_computes_the_same_bits(model):
    """As timm's own `test_model_forward_fx`, whose tolerance some versions have at zero."""
    _, nodes = get_graph_node_names(model)
    assert "stages.2.blocks.1" in nodes
    last_two = GraphExtractNet(model, ["stages.2.blocks.1", nodes[-1]])
    for batch_size in (1, 3):
        x = torch.randn(batch_size, 3, 64, 64)
        for gradients in (False, True):
            with torch.inference_mode(not gradients):
                block, logits = last_two(x)
                assert torch.equal(logits, model(x))
                assert torch.equal(block, model.forward_intermediates(x, [2], intermediates_only=True)[0])


def test_timms_feature_extractor_computes_the_same_bits(model):
    features = timm.models.FeatureGraphNet(model, out_indices=(0, 1, 2, 3))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.forward_intermediates(x, intermediates_only=True)
        assert all(map(torch.equal, features(x), expected))


def test_torchvisions_own_tracer_reaches_into_a_block(model):
    maps = create_feature_extractor(model, {"stages.1.blocks.0.attn.conv_dw": "context", "stages.1": "stage"})
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        found = maps(x)
        assert found["context"].shape == (1, 128, 8, 8)
        assert torch.allclose(found["stage"], model.forward_intermediates(x)[1][1], atol=1e-4)
