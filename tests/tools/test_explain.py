from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conv2former.errors import UserError
from conv2former.models import Conv2Former
from conv2former.models.ablations import FUSIONS
from conv2former.tools.prediction.explain import (
    Explainer,
    Heatmap,
    activation_map,
    default_stage,
    explain_figure,
    modulation_maps,
    spread,
)
from conv2former.tools.prediction.inputs import find_images
from conv2former.tools.prediction.predict import Predictor


def network(**changes) -> Conv2Former:
    torch.manual_seed(0)
    shape = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "kernel_size": 7, "head_hidden_size": 16}
    model = Conv2Former(**shape, num_classes=3, **changes).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def image_with_patch(top: int, left: int, side: int = 128, patch: int = 32) -> torch.Tensor:
    torch.manual_seed(1)
    image = torch.zeros(3, side, side)
    image[:, top : top + patch, left : left + patch] = torch.randn(3, patch, patch)
    return image


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 96), (96, 0), (96, 96), (32, 64)])
def test_the_place_of_an_object_lights_up(top, left):
    """A class whose weights are set to what the object looks like; the blocks are nearly the identity."""
    model, image = network(), image_with_patch(top, left)
    with torch.no_grad():
        features = model.head_conv(model.forward_features(image[None]))[0]
        object_, ground = features[:, top // 32, left // 32], features[:, 3 - top // 32, 3 - left // 32]
        model.head.fc.weight[1] = object_ - ground
        model.head.fc.weight[1] -= ground * (object_ - ground).dot(ground) / ground.dot(ground)  # the ground has none
    heatmap = activation_map(model, image, 1)
    assert heatmap.values.shape == (4, 4)
    assert divmod(int(heatmap.values.argmax()), 4) == (top // 32, left // 32)
    shown = spread(heatmap, 128, 128)
    inside = shown[top : top + 32, left : left + 32].sum()
    rows, columns = torch.nonzero(shown == shown.max()).unbind(1)
    assert top <= rows.min() <= rows.max() < top + 32
    assert left <= columns.min() <= columns.max() < left + 32
    assert inside > 0.3 * shown.sum()  # a cell of its own would have 0.56, a sixteenth of the image 0.06


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 96), (96, 0), (96, 96)])
def test_the_modulation_changes_where_the_image_does(top, left):
    model, image = network(), image_with_patch(top, left)
    stages = [1, 2, 3, 4]
    with_patch, without = (modulation_maps(model, x, stages) for x in (image, torch.zeros_like(image)))
    for one, other in zip(with_patch[:3], without, strict=False):
        change = (spread(one, 128, 128) - spread(other, 128, 128)).abs()
        assert int(change.argmax()) // 128 // 64 == top // 64
        assert int(change.argmax()) % 128 // 64 == left // 64
    assert [one.values.shape[0] for one in with_patch] == [32, 16, 8, 4]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_modulation_is_the_mean_of_what_fuse_gets(fusion, monkeypatch):
    model, image = network(fusion=fusion, ls_init_value=0.5), torch.randn(3, 64, 64)
    given = {}
    for stage in (1, 3):
        attn = model.stages[stage - 1].blocks[-1].attn
        real = attn.fuse
        monkeypatch.setattr(
            attn, "fuse", lambda a, v, stage=stage, real=real: (given.update({stage: a}), real(a, v))[1]
        )
    maps = modulation_maps(model, image, [1, 3])
    for one in maps:
        torch.testing.assert_close(one.values, given[one.stage][0].abs().mean(0))
        assert one.values.shape[0] * one.stride == 64


def test_the_map_of_the_last_stage_sums_to_the_score():
    model, image = network(ls_init_value=0.5), torch.randn(3, 96, 128)
    with torch.no_grad():
        score = model(image[None])[0, 2] - model.head.fc.bias[2]
    signed = activation_map(model, image, 2, signed=True)
    assert signed.values.shape == (3, 4)
    torch.testing.assert_close(signed.values.sum(), score)
    torch.testing.assert_close(activation_map(model, image, 2).values, signed.values.relu())


def test_maps_of_earlier_stages_weigh_channels_by_their_mean_gradient():
    model, image = network(ls_init_value=0.5), torch.randn(3, 64, 64)
    features = model.stages[:2](model.stem(image[None])).detach().requires_grad_()
    model.forward_head(model.stages[2:](features))[0, 1].backward()
    expected = (features.grad.mean((2, 3), keepdim=True) * features).sum(1)[0].relu()
    torch.testing.assert_close(activation_map(model, image, 1, stage=2).values, expected.detach())


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_the_network_is_as_it_was(compiled):
    model, image = network(ls_init_value=0.5), torch.randn(3, 64, 64)
    model.stem.requires_grad_(False)
    used = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        before = used(image[None])
    plain = [one.values for one in (activation_map(model, image, 0), *modulation_maps(model, image, [2]))]
    for values, one in zip(plain, (activation_map(used, image, 0), *modulation_maps(used, image, [2])), strict=True):
        assert torch.equal(values, one.values)
    with torch.no_grad():
        assert torch.equal(used(image[None]), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert not module.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.stem.parameters())
    assert not image.requires_grad


def test_hooks_go_after_an_error_too():
    model = network()
    with pytest.raises(RuntimeError):
        modulation_maps(model, torch.randn(5, 64, 64), [1])
    assert not any(module._forward_hooks for module in model.modules())


def test_spread_puts_each_value_at_the_centre_of_its_pixels():
    values = torch.tensor([[0.0, 4.0], [8.0, 12.0]])
    shown = spread(Heatmap(1, values, 4), 8, 8)
    columns = np.interp(np.arange(8) + 0.5, [2, 6], [0, 4])  # centres of the cells are 2 and 6 pixels from the edge
    rows = np.interp(np.arange(8) + 0.5, [2, 6], [0, 8])
    np.testing.assert_allclose(shown, rows[:, None] + columns[None, :], atol=1e-6)
    wider = spread(Heatmap(1, values, 4), 9, 11)  # three columns and a row that no cell covers
    assert wider.shape == (9, 11)
    torch.testing.assert_close(wider[:8, :8], shown)
    assert (wider[:8, 8:] == shown[:, 7:]).all()
    torch.testing.assert_close(spread(Heatmap(1, values, 4), 7, 7), shown[:7, :7])  # the stem rounds odd sizes up


@pytest.mark.parametrize("size", [64, 100, 115, 127])
def test_strides_at_sizes_that_are_no_multiples(size):
    model, image = network(), torch.randn(3, size, size)
    for stage in (1, 2, 3, 4):
        heatmap = activation_map(model, image, 0, stage)
        assert heatmap.stride == 2 ** (stage + 1)
        assert abs(heatmap.values.shape[0] * heatmap.stride - size) <= heatmap.stride


def test_default_stages():
    strides = (4, 8, 16, 32)
    assert [default_stage(size, strides) for size in (384, 224, 128, 127, 64, 32)] == [4, 4, 4, 3, 3, 2]
    assert [default_stage(size, strides[:3]) for size in (384, 224, 64, 32)] == [3, 3, 3, 2]
    assert default_stage(32, (2, 4, 8, 16)) == 3


def test_figure_of_a_class_that_nothing_speaks_for():
    pixels = np.zeros((64, 64, 3), np.float32)
    maps = [Heatmap(stage, torch.zeros(n, n), 2 ** (stage + 1)) for stage, n in ((4, 2), (3, 4))]
    figure = explain_figure(pixels, maps[0], "$x^2$ " * 20, maps[1:], "a\n$\\frac{")
    figure.canvas.draw()
    assert "nothing speaks for" in figure.axes[1].get_title()


@pytest.fixture
def predictor(tmp_path) -> Predictor:
    torch.save({"state_dict": network().state_dict(), "config": {"data": {"img_size": 64}}}, tmp_path / "small.pt")
    return Predictor(tmp_path / "small.pt")


def test_explainer(predictor, tmp_path):
    name = tmp_path / "a $b$ é\n.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(name)
    (prediction,) = predictor(find_images([str(name)]))
    path = Explainer(predictor, stages=[3, 1, 1]).write(prediction, tmp_path, 120, 7)
    assert path == "explanations/007_a_b.png"
    two = Explainer(predictor, "class 2", cam_stage=1).write(prediction, tmp_path, 1, 1)
    with Image.open(tmp_path / path) as wide, Image.open(tmp_path / two) as narrow:
        assert wide.width > narrow.width > 900


def test_without_captum(predictor, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UserError, match=r"pip install 'conv2former\[explain\]'"):
        Explainer(predictor)
