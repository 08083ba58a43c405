"""What pictures show at the edges: no mistakes, one image, long names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from conv2former.tasks.pictures import confusion_figure, grid_figure, many_confusions_figure, reliability_figure
from conv2former.tools.prediction.explain import Heatmap, explain_figure
from conv2former.tools.prediction.receptive_field import Field, fields_figure

RESULT = "the 1 mistake of the highest loss"
TITLE = f"…{'a_long_folder/' * 3}/best.pt\n…{'photos/' * 5}validation set, checkpoint preprocessing\n{RESULT}"
LONG = "a very long class name that goes on and on"


def check_inside(figure: Figure) -> None:
    """Checks that all that is drawn, texts above all, is inside the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02


def field(name: str, stage: int) -> Field:
    contribution = torch.rand(32, 32, dtype=torch.float64)
    return Field(name, stage, contribution / contribution.sum(), (16, 16), (4, 4))


NOTE = "effective receptive field of the middle of a stage, mean over 50 images of noise, standard normal values"
SUMS = torch.cat([torch.ones(2, 15), (torch.arange(15)[None] + 0.5) / 15])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: fields_figure([field("conv2former_digits of " + "folder/" * 12 + "best.pt", 4)], NOTE),
        lambda: fields_figure(
            [field("conv2former_t, random weights", stage) for stage in (1, 2, 3)], f"{NOTE}\n{NOTE}"
        ),
        lambda: reliability_figure(SUMS, 0.1, TITLE),
        lambda: grid_figure([np.zeros((3, 3, 3))], ["true: x, 0.1%\npredicted: y, 9.9%\na/b.png"], 5, 2.2, title=TITLE),
        lambda: confusion_figure([[3, 0], [0, 2]], ["ok", LONG], TITLE),
        lambda: many_confusions_figure(torch.ones(60, 60, dtype=torch.int64), [LONG] * 60, TITLE),
        lambda: explain_figure(
            np.zeros((32, 32, 3)), Heatmap(2, torch.rand(4, 4), 8), LONG, [Heatmap(2, torch.rand(4, 4), 8)], "x" * 90
        ),
    ],
)
def test_no_text_is_cut(draw):
    check_inside(draw())


def test_no_mistakes_are_words_and_no_empty_axes():
    figure = many_confusions_figure(torch.eye(60, dtype=torch.int64), [f"class {i}" for i in range(60)], TITLE)
    assert not figure.axes[1].axison
    assert [text.get_text() for text in figure.axes[1].texts] == ["No mistakes"]
    check_inside(figure)


def test_the_legend_hides_no_bar():
    """All bins are full, so that there is no empty corner."""
    figure = reliability_figure(SUMS, 0.1, TITLE)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.legends
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
