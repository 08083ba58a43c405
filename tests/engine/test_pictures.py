from __future__ import annotations

from functools import partial

import pytest

from conv2former.engine import pictures
from conv2former.tasks.registry import task_named

curves_figure = partial(pictures.curves_figure, task_named("classification"))


def rows(epochs: int, has_ema: bool = True) -> list[dict]:
    """As a run of ten steps an epoch writes them, a line every five."""
    found: list[dict] = []
    for epoch in range(1, epochs + 1):
        for step in (10 * epoch - 5, 10 * epoch):
            found.append({"kind": "train", "step": step, "epoch": epoch, "loss": 2 - 0.01 * step})
        row = {"kind": "eval", "step": 10 * epoch, "epoch": epoch, "loss": 1.5, "top1": 90.0 + epoch, "top5": 99.0}
        found.append(row | ({"ema_top1": 50.0 + epoch, "ema_loss": 1.2, "ema_top5": 98.0} if has_ema else {}))
    return found


def test_the_curves():
    left, right = curves_figure(rows(3), 2).axes
    lines = {line.get_label(): line for axes in (left, right) for line in axes.lines}
    assert list(lines["training"].get_xdata()) == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert list(lines["validation, averaged weights"].get_ydata()) == [1.2] * 3
    assert list(lines["top-1"].get_ydata()) == [91.0, 92.0, 93.0]
    best = lines["best: epoch 2, 52.00 %"]  # of the averaged weights, by which best.pt is chosen
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([2], [52.0])
    assert not [label for label in lines if "5" in label.replace("52", "")]  # no top-5
    raw = {line.get_label() for line in curves_figure(rows(3, has_ema=False), 2).axes[1].lines}
    assert raw == {"top-1", "best: epoch 2, 92.00 %"}


@pytest.mark.parametrize("has_ema", [True, False])
def test_a_linear_probe_is_a_point_apart(has_ema):
    probe = {"kind": "eval", "step": 0, "epoch": 0, "loss": 0.4, "top1": 97.0, "ema_top1": 97.0, "ema_loss": 0.4}
    first = probe if has_ema else {key: value for key, value in probe.items() if not key.startswith("ema_")}
    for axes, value in zip(curves_figure([first, *rows(3, has_ema)], 0).axes, (0.4, 97.0), strict=True):
        lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        assert lines["linear probe"] == ([0], [value])
        assert all(min(xs) > 0 for label, (xs, _) in lines.items() if label in ("top-1", "validation", "training"))
    assert lines["best: linear probe, 97.00 %"] == ([0], [97.0])
    assert curves_figure([first], 0).axes[1].get_xlim()[1] > 0


@pytest.mark.parametrize(
    ("epochs", "kinds"), [(0, ()), (1, ("eval",)), (1, ("train", "eval")), (400, ("train", "eval"))]
)
def test_the_axes_fit_any_number_of_points(epochs, kinds):
    found = [row for row in rows(epochs) if row["kind"] in kinds and row["step"] % 10 == 0]
    for row in found:
        row |= {"top1": 99.0} if "top1" in row else {}
    for axes in curves_figure(found, 1).axes:
        if epochs:
            assert axes.get_xlim()[0] == 0
            assert epochs < axes.get_xlim()[1] < 1.1 * epochs
        for line in axes.lines[:-1]:
            assert (line.get_marker() == ".") == (epochs == 1)
    if epochs == 1:
        left, right = curves_figure(found[-1:], 1).axes
        assert right.get_ylim()[1] <= 102
        assert left.get_ylim()[1] - left.get_ylim()[0] >= 0.2 - 1e-9
