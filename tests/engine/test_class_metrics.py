"""Metrics of single classes, against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, recall_score

from conv2former.engine import World
from conv2former.tasks.classification.class_metrics import ClassMetrics, about_missing
from conv2former.tasks.classification.evaluation import MAX_CONFUSION_CLASSES, Score

WORLD = World(0, 1, torch.device("cpu"))


def answered(labels: np.ndarray, predicted: np.ndarray, classes: int):
    """Returns the evaluation of a network that has answered so, in batches of 7."""
    score = Score(WORLD.device)
    for some in torch.arange(len(labels)).split(7):
        logits = torch.nn.functional.one_hot(torch.tensor(predicted)[some], classes).float()
        score.update(logits, torch.tensor(labels)[some], some)
    return score.total(WORLD, [])


@pytest.mark.parametrize("classes", [3, 10, MAX_CONFUSION_CLASSES + 30])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_against_scikit_learn(classes, seed):
    """Some classes have no image, some are never the answer, the last is neither; few images, so that ties are none."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - 2, 200)
    predicted = np.where(rng.random(200) < 0.5, labels, rng.integers(1, classes - 1, 200))
    result = answered(labels, predicted, classes)
    found = ClassMetrics.of(result.per_class)
    assert result.metrics["macro_f1"] == pytest.approx(100 * f1_score(labels, predicted, average="macro"))
    assert result.metrics["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    assert result.metrics["macro_f1"] != pytest.approx(result.metrics["top1"], abs=0.01)
    options = {"labels": range(classes), "average": None, "zero_division": np.nan}
    for values, score in ((found.recall, recall_score), (found.precision, precision_score), (found.f1, f1_score)):
        expected = 100 * score(labels, predicted, **options)
        assert values.numpy() == pytest.approx(expected, nan_ok=True)
        assert np.isnan(expected[-1])
    rows = found.rows([f"class {i}" for i in range(classes)])
    assert [row["images"] for row in rows] == np.bincount(labels, minlength=classes).tolist()
    assert [row["answered"] for row in rows] == np.bincount(predicted, minlength=classes).tolist()
    assert rows[-1] == {
        "class": f"class {classes - 1}", "images": 0, "answered": 0, "recall": None, "precision": None, "f1": None,
    }  # fmt: skip


def test_a_class_without_images_is_said_and_has_no_recall():
    result = answered(np.array([0, 0, 0, 1]), np.array([0, 0, 2, 1]), 3)
    found = ClassMetrics.of(result.per_class)
    assert result.metrics["balanced_accuracy"] == pytest.approx((200 / 3 + 100) / 2)
    assert result.metrics["macro_f1"] == pytest.approx((80 + 100 + 0) / 3)  # an answer that can only be wrong counts
    assert found.recalls(["a", "b", "c"]) == {"recall/a": pytest.approx(200 / 3), "recall/b": 100.0}
    rows = found.rows(["a", "b", "c"])
    text = "1 of 3 classes has no image: it has no recall, and no part in balanced accuracy (c)"
    assert about_missing(rows) == text
    assert about_missing(rows[:2]) == ""


def test_counts_are_exact_beyond_what_floats_hold():
    big = 2**53 + 1
    found = ClassMetrics.of([[big, 1], [big, 0], [big, 1], [big, 1]])
    assert [row["images"] for row in found.rows(["a", "b"])] == [big, 1]
