"""Growth with the image, on networks of a few milliseconds."""

from __future__ import annotations

import pytest
import torch

from conv2former.tools.benchmark import growth as benchmark_growth
from conv2former.tools.benchmark.growth import growth_figure, growth_foot, growth_markdown, growth_plan, measure_growth
from conv2former.tools.benchmark.results import Baseline, Group, Report, Result, Setting

from .test_benchmark_models import MACHINE, OURS

pytestmark = pytest.mark.slow

SIZES = [(64, 96), (64, 64)]  # height, width


def test_every_size_is_measured(tmp_path):
    report = measure_growth(growth_plan([OURS, "test_vit:fused_attn=false"], SIZES, torch.device("cpu"), rounds=1))
    assert all(result.error is None for group in report.groups for result in group.results)
    text = growth_foot(report)
    assert text.index("64 x 64") < text.index("96 x 64")
    assert text.count("(1.00)") >= 2 * 3
    assert "(growth.png)" in growth_markdown(report, tmp_path / "growth.png")
    growth_figure(report).savefig(tmp_path / "growth.png")
    held = {r.setting.height * r.setting.width: r.bytes_held_per_image for g in report.groups for r in g.results[:1]}
    assert held[64 * 96] / held[64 * 64] == pytest.approx(1.5, rel=0.02)  # ours: flat per pixel


def test_cost_per_pixel():
    """Twice the pixels at three times the time are 1.5 times the cost per pixel."""
    groups = []
    for width, seconds in ((32, 0.010), (64, 0.030)):
        setting = Setting("training", "fp32", 32, width, 1, "nchw", "eager")
        groups.append(Group([Result("a", setting, bytes_held_per_image=width * 1e6, seconds=[seconds])]))
    text = growth_foot(Report("", MACHINE, Baseline("a"), 1, 1, groups))
    assert "10.0 (1.00)  30.0 (1.50)" in text
    assert "32.0 (1.00)  64.0 (1.00)" in text


def test_a_size_that_memory_cannot_hold_is_not_tried(monkeypatch):
    monkeypatch.setattr(benchmark_growth, "free_memory", lambda: 1_000)
    report = measure_growth(growth_plan([OURS], [(32, 32), (96, 96)], torch.device("cpu"), rounds=1))
    small, large = (group.results[0] for group in report.groups if group.setting.mode == "training")
    assert small.error is None
    assert "are free" in large.error
    assert "not measured: " + OURS in growth_foot(report)
