from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from conv2former.data import Batch
from conv2former.engine import World
from conv2former.tasks.classification.evaluation import Score
from conv2former.tasks.classification.tallies import BINS, Calibration, PerClass, RealLabels, Worst, calibration_error

from .conftest import evaluate_classifier as evaluate
from .conftest import evaluate_views

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)


def linear(classes: int = 8) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, classes))


def batches(images, labels, size: int) -> list[Batch]:
    places = torch.arange(len(labels)).split(size)
    parts = zip(images.split(size), labels.split(size), places, strict=True)
    empty = Batch(torch.empty(0, 3, 1, 1), torch.empty(0, dtype=torch.int64), [])
    return [Batch(image, label, [], place) for image, label, place in parts] + [empty]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_against_a_plain_count(batch_size):
    torch.manual_seed(0)
    model = linear()
    images, labels = torch.randn(23, 3, 2, 2), torch.randint(8, (23,))
    evaluation = evaluate(model.train(), batches(images, labels, batch_size), WORLD, nullcontext)
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
    model = linear()
    asked = []

    def interrupted() -> bool:
        asked.append(1)
        return len(asked) == 2

    batch = Batch(torch.randn(2, 3, 2, 2), torch.tensor([0, 1]), [])
    assert evaluate(model, [batch] * 5, WORLD, nullcontext, interrupted=interrupted) is None
    assert len(asked) == 2


def test_views_are_scored_each_by_itself():
    torch.manual_seed(1)
    model, labels = linear(), torch.randint(8, (23,))
    views = torch.randn(23, 2, 3, 2, 2)
    both = evaluate_views(model, batches(views, labels, 5), WORLD, nullcontext, [Score(CPU), Score(CPU)])
    alone = [evaluate(model, batches(views[:, i], labels, 5), WORLD, nullcontext) for i in range(2)]
    assert [result.metrics for result in both] == [result.metrics for result in alone]
    assert both[0].metrics != both[1].metrics


def test_ties_are_counted_alike():
    """Logits in bf16 are often equal: what top-1 counts as right is on the diagonal of the confusions."""
    model = linear()
    torch.nn.init.zeros_(model[1].weight)
    torch.nn.init.zeros_(model[1].bias)
    labels = torch.arange(8).repeat(3)
    score = Score(CPU, tallies={"per_class": PerClass(8, CPU)})
    (result,) = evaluate_views(model, batches(torch.randn(24, 3, 2, 2), labels, 5), WORLD, nullcontext, [score])
    right = round(result.metrics["top1"] * 24 / 100)
    assert int(result.confusion.diagonal().sum()) == int(result.tallies["per_class"][1].sum()) == right


@pytest.fixture
def answers():
    """A model, images, labels, and the model's logits."""
    torch.manual_seed(2)
    model = linear()
    with torch.no_grad():
        model[1].weight *= 3
    images, labels = torch.randn(60, 3, 2, 2), torch.randint(8, (60,))
    return model, images, labels, model(images).detach()


def score_of(answers, **kwargs):
    model, images, labels, _ = answers
    (result,) = evaluate_views(model, batches(images, labels, 7), WORLD, nullcontext, [Score(CPU, **kwargs)])
    return result


def test_among_some_classes(answers):
    model, images, labels, logits = answers
    among = [6, 1, 3]  # in any order
    kept = torch.tensor([int(label) in among for label in labels])
    result = score_of((model, images[kept], labels[kept], None), among=among, tallies={"per_class": PerClass(3, CPU)})
    some, places = logits[kept][:, among], torch.tensor([among.index(int(label)) for label in labels[kept]])
    right = some.argmax(1) == places
    assert result.metrics["top1"] == pytest.approx(100 * right.double().mean().item())
    assert result.metrics["top5"] == 100
    assert result.metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(some, places).item(), rel=1e-6)
    assert result.confusion.shape == (3, 3)
    assert result.tallies["per_class"][0].tolist() == torch.bincount(places).tolist()
    assert 0 < int(right.sum()) < len(right)


def test_per_class(answers):
    _, _, labels, logits = answers
    counts = score_of(answers, tallies={"t": PerClass(8, CPU)}).tallies["t"].tolist()
    order = logits.argsort(1, descending=True).tolist()
    for i in range(8):
        rows = [row for row, label in zip(order, labels.tolist(), strict=True) if label == i]
        expected = [len(rows), sum(row[0] == i for row in rows), sum(i in row[:5] for row in rows)]
        assert [counts[k][i] for k in range(3)] == expected
        assert counts[3][i] == sum(row[0] == i for row in order)


def test_calibration(answers):
    _, _, labels, logits = answers
    sums = score_of(answers, tallies={"t": Calibration(CPU)}).tallies["t"]
    exponents = np.exp(logits.double().numpy())
    shares = exponents / exponents.sum(1, keepdims=True)
    confidence, right = shares.max(1), shares.argmax(1) == labels.numpy()
    expected = 0.0
    for i in range(BINS):
        inside = (confidence > i / BINS) & (confidence <= (i + 1) / BINS)
        assert sums[0, i] == inside.sum()
        assert sums[1, i] == right[inside].sum()
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert (sums[0] > 0).sum() > 3
    assert calibration_error(sums) == pytest.approx(expected, rel=1e-6)
    assert 0.01 < expected < 1


def test_certain_answers_are_in_the_last_bin():
    sums = Calibration(CPU)
    score = Score(CPU, tallies={"t": sums})
    score.update(torch.tensor([[1000.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert sums.sums[0].nonzero()[:, 0].tolist() == [7, 14]  # 0.5 is in (7/15, 8/15]


def test_the_worst_mistakes(answers):
    _, _, labels, logits = answers
    found = score_of(answers, tallies={"t": Worst(5)}).tallies["t"]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    predicted, shares = logits.argmax(1), logits.softmax(1)
    wrong = [i for i in losses.argsort(descending=True).tolist() if predicted[i] != labels[i]]
    assert [mistake.place for mistake in found] == wrong[:5]
    for mistake in found:
        i = mistake.place
        assert (mistake.label, mistake.predicted) == (int(labels[i]), int(predicted[i]))
        assert mistake.loss == pytest.approx(losses[i].item(), rel=1e-5)
        assert mistake.confidence == pytest.approx(shares[i, predicted[i]].item(), rel=1e-5)
        assert mistake.label_confidence == pytest.approx(shares[i, labels[i]].item(), rel=1e-5)
    everything = score_of(answers, tallies={"t": Worst(100)}).tallies["t"]
    assert [mistake.place for mistake in everything] == wrong
    assert len(wrong) < 60


def test_more_than_one_label(answers):
    """Images without a label are left out; any of several is right."""
    logits = answers[3]
    lists = [[], [0], [1, 2], [3, 4, 5]] * 15
    table = torch.tensor([row + [-1] * (3 - len(row)) for row in lists])
    n, top1, top5 = score_of(answers, tallies={"t": RealLabels(table, CPU)}).tallies["t"].tolist()
    order = logits.argsort(1, descending=True).tolist()
    assert n == 45
    assert top1 == sum(row[0] in real for row, real in zip(order, lists, strict=True))
    assert top5 == sum(bool({*row[:5]} & {*real}) for row, real in zip(order, lists, strict=True))
    assert 0 < top1 < top5


def test_confusions_of_many_classes_are_not_counted():
    images, labels = torch.randn(6, 3, 2, 2), torch.arange(6)
    loader = batches(images, labels, 4)
    assert evaluate(linear(51), loader, WORLD, nullcontext).confusion is None
    (result,) = evaluate_views(linear(51), loader, WORLD, nullcontext, [Score(CPU, max_confusion_classes=51)])
    assert int(result.confusion.sum()) == 6


def test_a_long_evaluation_is_seen_to_be_at_work():
    """So that what takes longer than the others may wait, with nobody waiting, does not end a run."""
    seen = []
    world = World(0, 1, CPU, at=seen.append, works=lambda: seen.append("works"))
    batch = Batch(torch.randn(2, 3, 2, 2), torch.tensor([0, 1]), [])
    evaluate(linear(), [batch] * 3, world, nullcontext)
    assert seen == ["works"] * 3 + ["the end of an evaluation"]
