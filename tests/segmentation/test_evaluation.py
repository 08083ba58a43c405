"""Counts, losses and metrics by hand, and the same whatever the number of processes, windows and batches."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from conv2former.tasks.dense.thumbnails import as_numbers, thumbnails
from conv2former.tasks.segmentation import pictures
from conv2former.tasks.segmentation.config import SegmentationConfig
from conv2former.tasks.segmentation.evaluation import ClassCounts, MaskEvaluator, about_missing
from conv2former.tasks.segmentation.inference import Answerer, windows
from conv2former.tasks.segmentation.loader import EvalBatch, MaskBatch
from conv2former.tasks.segmentation.loss import SegmentationObjective, cross_entropy, dice_loss
from conv2former.tasks.segmentation.saved import is_pixels, is_worst
from conv2former.tasks.segmentation.task import Segmentation

from ..engine.conftest import configure


@dataclasses.dataclass
class Played:
    """The processes of a run: what each of them gives is known before."""

    evaluators: list[MaskEvaluator]
    device = torch.device("cpu")
    rank = 0

    @property
    def size(self):
        return len(self.evaluators)

    def sum(self, value):
        classes = len(value)
        zeros = torch.zeros(classes, classes, dtype=torch.int64)
        return sum((zeros if e.confusion is None else e.confusion) for e in self.evaluators)

    def gather(self, value):
        if isinstance(value, int):
            return [0 if e.confusion is None else len(e.confusion) for e in self.evaluators]
        return [e.worst if value is self.evaluators[0].worst else e.results for e in self.evaluators]


def by_colour(images: torch.Tensor) -> torch.Tensor:
    """A network: the logit of each class of three is how bright the pixel's channel is."""
    return 3 * images


def batch(seeds, size=(9, 14), classes=3) -> EvalBatch:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = [torch.randint(256, (3, *size), generator=g, dtype=torch.uint8) for g in generators]
    masks = [torch.randint(classes, size, generator=g).to(torch.uint8) for g in generators]
    for mask in masks:
        mask[0] = 255
    return EvalBatch(images, masks, [], list(seeds), [f"image {seed}" for seed in seeds])


@pytest.fixture
def config(raw) -> SegmentationConfig:
    return configure(raw, data__mean=[0.5] * 3, data__std=[0.5] * 3, evaluation__pictures=2)


def evaluated(config, *batches, network=by_colour):
    evaluator = MaskEvaluator(config, torch.device("cpu"))
    for each in batches:
        evaluator.update(network, each)
    return evaluator, evaluator.total(Played([evaluator]), [])


def test_metrics_by_hand(config):
    """Every number, counted pixel by pixel in NumPy."""
    given = batch(range(4))
    _, found = evaluated(config, given)
    truth = np.stack([mask.numpy() for mask in given.masks])
    images = np.stack([image.numpy() for image in given.images]).astype(np.float64)
    logits = 3 * (images / 255 - 0.5) / 0.5
    answers, counts = logits.argmax(1), truth != 255
    ious = []
    for c in range(3):
        right = ((truth == c) & (answers == c) & counts).sum()
        ious.append(100 * right / (((truth == c) | (answers == c)) & counts).sum())
    shares = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    losses = [-shares[n, truth[n, y, x], y, x] for n, y, x in np.argwhere(counts)]
    assert found.metrics == {
        "miou": pytest.approx(np.mean(ious)),
        "pixel_accuracy": pytest.approx(100 * (truth == answers)[counts].mean()),
        "mean_accuracy": pytest.approx(np.mean([100 * (answers == c)[truth == c].mean() for c in range(3)])),
        "loss": pytest.approx(np.mean(losses), rel=1e-5),
        "n": 4,
    }
    row = found.row(["a", "b", "c"])
    assert [row[f"iou/{name}"] for name in "abc"] == pytest.approx(ious)


def test_any_number_of_processes_and_any_batches_give_the_same(config):
    whole, expected = evaluated(config, batch(range(7)))
    parts = [evaluated(config, *(batch([i]) for i in range(7) if i % 3 == rank))[0] for rank in range(3)]
    idle = MaskEvaluator(config, torch.device("cpu"))  # a process without images
    found = parts[0].total(Played([*parts, idle]), [])
    assert found.metrics == expected.metrics
    assert torch.equal(found.confusion, expected.confusion)
    assert found.worst == expected.worst
    assert len(found.worst) == 2
    assert found.worst[0].iou == min(w.iou for w in whole.worst)
    details = found.details()
    assert is_pixels(details["pixels"])
    assert is_worst(details["worst"])
    assert not is_worst([[1.0, 2, "name"]])


def test_classes_that_never_occur_have_no_iou_and_are_said(config):
    """Also where they are answered: that costs the others."""
    given = batch(range(3), classes=2)
    _, found = evaluated(config, given)
    counts = found.counts
    assert math.isnan(counts.iou[2])
    assert counts.predicted[2] > 0
    assert found.metrics["miou"] == pytest.approx(float(counts.iou[:2].mean()))
    assert about_missing(counts.rows(["a", "b", "c"])) == "no pixel of c, left out of the means over the classes"
    assert "iou/c" not in found.row(["a", "b", "c"])
    lines = Segmentation().about_first_evaluation(found, ["a", "b", "c"])
    assert lines == ["validation: no pixel of c, left out of the means over the classes"]
    report = Segmentation().report({**found.metrics}, found.details(), ["a", "b", "c"])
    assert report["classes"][2] == {"class": "c", "pixels": 0, "iou": None, "recall": None}
    assert report["worst_images"][0]["image"].startswith("image ")
    assert "c, left out" in Segmentation().summarise({**report, "n": 3})[1][-1]


def test_only_ignored_pixels_are_no_numbers_that_are_none(config):
    given = batch(range(2))
    for mask in given.masks:
        mask.fill_(255)
    _, found = evaluated(config, given)
    assert found.metrics == {"miou": 0.0, "pixel_accuracy": 0.0, "mean_accuracy": 0.0, "loss": 0.0, "n": 2}
    assert found.worst == []
    assert ClassCounts.of(torch.zeros(3, 4, dtype=torch.int64)).metrics()["miou"] == 0.0
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    targets = torch.full((2, 4, 5), -1)
    loss = cross_entropy(logits, targets) + dice_loss(logits, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_losses_by_hand(config):
    logits, targets = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    targets[0, :2], targets[1] = -1, targets[1].clamp(max=1)
    weights = torch.tensor([1.0, 2.0, 0.5])
    shares = logits.softmax(1)
    by_hand, dice = 0.0, []
    for n in range(2):
        for y in range(4):
            for x in range(5):
                if (c := int(targets[n, y, x])) >= 0:
                    by_hand -= float(weights[c] * shares[n, c, y, x].log()) / 40
        counts, own = targets[n] >= 0, []
        for c in targets[n][counts].unique():
            p, t = shares[n, c][counts], (targets[n] == c)[counts].float()
            own.append(1 - 2 * float((p * t).sum()) / float(p.sum() + t.sum()))
        dice.append(np.mean(own))
    assert float(cross_entropy(logits, targets, weights)) == pytest.approx(by_hand, rel=1e-5)
    assert float(dice_loss(logits, targets)) == pytest.approx(np.mean(dice), rel=1e-5)
    objective = SegmentationObjective(config, torch.device("cpu"), 3, np.array([100, 400, 0]))
    torch.testing.assert_close(objective.weights, torch.tensor([5 / 3, 5 / 6, 0.0]))  # sqrt, and 1 in the mean
    masks = torch.where(targets < 0, 255, targets).to(torch.uint8)
    images, prepared = objective.prepare(MaskBatch(torch.zeros(2, 3, 4, 5), masks, []), 0)
    assert torch.equal(prepared, targets)
    calls = []

    def forward(images):
        calls.append(images)
        return logits, 2 * logits

    parts = [cross_entropy(scale * logits, targets, objective.weights) for scale in (1, 2)]
    total = parts[0] + 0.5 * dice_loss(logits, targets) + 0.4 * parts[1]
    torch.testing.assert_close(objective.loss(forward, images, prepared), total)
    assert len(calls) == 1


def test_windows_cover_a_side_and_overlap():
    assert windows(10, 16, 0.5) == windows(16, 16, 0.5) == [0]
    for length, window, overlap in ((17, 16, 0.5), (100, 32, 1 / 3), (4000, 512, 0.0), (33, 8, 0.9)):
        starts = windows(length, window, overlap)
        assert (starts[0], starts[-1]) == (0, length - window)
        assert all(0 < b - a <= max(1, round(window * (1 - overlap))) for a, b in itertools.pairwise(starts))


def test_windows_and_mirrors_do_not_change_what_a_pixelwise_network_says():
    images = torch.randn(2, 3, 21, 34)
    sizes = [(21, 34), (42, 68)]
    plain = Answerer(None, 0.0, False)(by_colour, images, sizes)
    assert [each.shape for each in plain] == [(3, 21, 34), (3, 42, 68)]
    seen = []

    def network(crops):
        seen.append(tuple(crops.shape))
        return by_colour(crops)

    for answerer in (Answerer((8, 16), 0.3, False), Answerer((8, 64), 0.3, True), Answerer(None, 0.0, True)):
        for found, expected in zip(answerer(network, images, sizes), plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert {(2, 3, 8, 16), (2, 3, 8, 34), (2, 3, 21, 34)} == set(seen)

    def left(crops):  # knows left from right, which the mean with the mirrored image does not
        return crops * torch.linspace(0, 1, crops.shape[3])

    mirrored = Answerer(None, 0.0, True)
    shares = mirrored(left, images, sizes)[0].exp()
    torch.testing.assert_close(shares, mirrored(left, images.flip(3), sizes)[0].flip(2).exp())


def test_pictures_of_a_batch_and_of_the_worst_images(config):
    targets, image = torch.randint(-1, 3, (400, 900)), torch.zeros(3, 200, 450, dtype=torch.uint8)
    small = thumbnails(image, targets, targets.clamp(min=0))
    assert as_numbers(small.truth).shape == (142, 320)
    assert set(np.unique(as_numbers(small.truth))) == {-1, 0, 1, 2}
    row = thumbnails(
        torch.zeros(1, 1, 4000, dtype=torch.uint8), torch.zeros(1, 4000).long(), torch.zeros(1, 4000).long()
    )
    assert as_numbers(row.predicted).shape == (1, 320)
    names = ["$a_b$", "</b>", "道" * 30]
    worst = [[12.5, 3, "a/b.png", *small], [13.0, 4, "c.png", *row]]
    for figure in (
        pictures.worst_figure(worst, names),
        pictures.batch_figure(torch.zeros(2, 3, 8, 8), torch.randint(-1, 3, (2, 8, 8)), names, (0.5,) * 3, (0.5,) * 3),
    ):
        FigureCanvasAgg(figure).draw()
        assert {text.get_text()[:5] for text in figure.legends[0].get_texts()} == {"$a_b$", "</b>", "道" * 5}
    assert pictures.worst_figure([], names) is None
