from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from conv2former.data import Batch
from conv2former.engine import World, evaluate

WORLD = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_against_a_plain_count(batch_size):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    images, labels = torch.randn(23, 3, 2, 2), torch.randint(8, (23,))
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    loader = [Batch(*part, []) for part in parts] + [
        Batch(torch.empty(0, 3, 1, 1), torch.empty(0, dtype=torch.int64), [])
    ]
    evaluation = evaluate(model.train(), loader, WORLD, nullcontext)
    result = evaluation.metrics
    order = model(images).argsort(1, descending=True)
    assert result["n"] == 23
    assert result["top1"] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert result["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(model(images), labels).item(), rel=1e-5)
    assert not model.training
    confusion = torch.zeros(8, 8, dtype=torch.int64)
    for true, predicted in zip(labels.tolist(), order[:, 0].tolist(), strict=True):
        confusion[true, predicted] += 1
    assert torch.equal(evaluation.confusion, confusion)


def test_an_interrupted_evaluation_has_no_result():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    asked = []

    def interrupted() -> bool:
        asked.append(1)
        return len(asked) == 2

    batch = Batch(torch.randn(2, 3, 2, 2), torch.tensor([0, 1]), [])
    assert evaluate(model, [batch] * 5, WORLD, nullcontext, interrupted=interrupted) is None
    assert len(asked) == 2
