from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from conv2former.engine import World, evaluate

WORLD = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_against_a_plain_count(batch_size):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    images, labels = torch.randn(23, 3, 2, 2), torch.randint(8, (23,))
    loader = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    result = evaluate(model.train(), loader, WORLD, nullcontext)
    order = model(images).argsort(1, descending=True)
    assert result["n"] == 23
    assert result["top1"] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert result["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(model(images), labels).item(), rel=1e-5)
    assert not model.training
