"""What drop path multiplies images with, drawn for all blocks of a stage together, as on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from conv2former import _private
from conv2former.models import fusion

CPU = torch.device("cpu")


@pytest.mark.parametrize("missing", [[], [_private.ADD_ALL, _private.DIVIDE_ALL]], ids=["together", "one by one"])
def test_the_share_of_images_that_are_kept(missing, monkeypatch):
    for name in missing:
        monkeypatch.setattr(name, "value", None)
    torch.manual_seed(0)
    rates = [0.1, 0.5, 0.95]
    masks = fusion.draw_together([DropPath(rate) for rate in rates], (20_000, 1, 1, 1), CPU)
    for mask, rate in zip(masks, rates, strict=True):
        assert (mask.shape, mask.dtype) == ((20_000, 1, 1, 1), torch.float32)
        torch.testing.assert_close(mask.unique(), torch.tensor([0.0, 1 / (1 - rate)]))
        assert abs((mask > 0).float().mean() - (1 - rate)) < 0.015  # four standard deviations
    assert not torch.equal(masks[0] > 0, masks[1] > 0)
    torch.manual_seed(0)
    again = fusion.draw_together([DropPath(rate) for rate in rates], (20_000, 1, 1, 1), CPU)
    assert all(map(torch.equal, masks, again))


def test_the_ends_of_the_range_and_no_scale():
    layers = [DropPath(1.0), DropPath(0.5, scale_by_keep=False)]
    nothing, half = fusion.draw_together(layers, (100, 1, 1, 1), CPU)
    assert not nothing.any()
    assert half.unique().tolist() == [0.0, 1.0]


def test_who_draws():
    """No mask without drop path, in evaluation, and at rate 0; the types are those of the branches."""
    layers = [nn.Identity(), DropPath(0.0), DropPath(0.5), DropPath(0.5).eval(), DropPath(0.3)]
    dtypes = [torch.float32] * 4 + [torch.bfloat16]
    x = SimpleNamespace(shape=(6, 8, 4, 4), is_cpu=False, device=CPU)
    masks = fusion.drop_masks(layers, x, dtypes)
    assert [mask is None for mask in masks] == [True, True, False, True, False]
    assert [mask.dtype for mask in masks if mask is not None] == [torch.float32, torch.bfloat16]
    assert fusion.drop_masks(layers[:2], x, dtypes[:2]) == [None, None]
