from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import conv2former
from conv2former.errors import CheckpointError, ConfigError, OutputError
from conv2former.models import Conv2Former
from conv2former.tools.prediction.receptive_field import (
    check_picture,
    fields_figure,
    fields_table,
    measure_all,
    measure_fields,
    noise_images,
    random_network,
    smallest_squares,
)

from ..conftest import run_script


def network(kernel_size: int = 7, depths=(1, 1, 1, 1), **changes) -> Conv2Former:
    torch.manual_seed(0)
    shape = {"dims": (8, 16, 24, 32), "depths": depths, "kernel_size": kernel_size, "head_hidden_size": 16}
    model = Conv2Former(**shape, num_classes=2, ls_init_value=1.0, **changes).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def reach(kernel_size: int) -> int:
    """The pixels that a feature of stage 1 can depend on, on a side: three convolutions of the stem, then a block's."""
    side, stride = 1, 1
    for kernel, step in ((3, 2), (3, 1), (2, 2), (kernel_size, 1), (3, 1)):
        side, stride = side + (kernel - 1) * stride, stride * step
    return side


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_a_field_is_what_the_kernels_reach_and_around_its_centre(kernel_size):
    (field,) = measure_fields(network(kernel_size), noise_images(4, 96), [1])
    assert field.contribution.shape == (96, 96)
    assert float(field.contribution.sum()) == pytest.approx(1)
    assert (field.cells, field.centre) == ((24, 24), (50, 50))
    for side in torch.nonzero(field.contribution).unbind(1):
        low, high = int(side.min()), int(side.max()) + 1
        assert high - low == reach(kernel_size)
        assert (low + high) / 2 == pytest.approx(50, abs=0.5)  # the stem's first padding is half a pixel


def test_as_the_gradient_without_any_saving():
    model, images = network(depths=(1, 2, 1, 1)), list(noise_images(3, 64, seed=1))
    fields = measure_fields(model, images, [2, 4])
    for field, index in zip(fields, (1, 3), strict=True):
        expected = torch.zeros(64, 64)
        for image in images:
            x = image[None].clone().requires_grad_()
            feature = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
            n = feature.shape[2] // 2
            feature[0, :, n, n].clamp(min=0).sum().backward()
            expected += x.grad[0].clamp(min=0).sum(0)
        torch.testing.assert_close(field.contribution.float(), expected / expected.sum())


def test_the_network_is_as_it_was():
    model, (image,) = network(), noise_images(1, 64)
    model.stages[1].grad_checkpointing = True
    with torch.no_grad():
        before = model(image[None])
    measure_fields(model, [image], [3])
    assert [stage.grad_checkpointing for stage in model.stages] == [False, True, False, False]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not image.requires_grad
    with torch.no_grad():
        assert torch.equal(model(image[None]), before)


def test_squares():
    contribution = torch.zeros(8, 8)
    contribution[3:5, 3:5] = 5  # beside the centre: 20 of 100
    contribution[2, 2] = 29
    contribution[7, 0] = 51
    found = smallest_squares(contribution, (4, 4), (0.2, 0.201, 0.49, 0.5, 1.0))
    assert [square.side for square in found] == [2, 4, 4, 8, 8]
    assert [square.area for square in found] == [4 / 64, 16 / 64, 16 / 64, 1, 1]
    (over,) = smallest_squares(torch.eye(8), (6, 6), (1.0,))  # it reaches over the edge
    assert (over.side, over.area) == (12, 1.0)


def test_a_larger_kernel_sees_more(tmp_path):
    sides = []
    for kernel_size in (3, 11):
        path = tmp_path / f"field_k{kernel_size}.yaml"
        path.write_text(f"dims: [8, 16, 24, 32]\ndepths: [1, 1, 2, 1]\nkernel_size: {kernel_size}\n")
        model = random_network(conv2former.register_variant(path))
        (field,) = measure_fields(model, noise_images(3, 224), [3])
        sides.append(field.squares[2].side)
    assert sides[1] > 1.5 * sides[0]


def test_random_networks(tiny):
    first, second = (random_network(tiny).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (first["stages.0.blocks.0.ls1.gamma"] == 1).all()
    with pytest.raises(ConfigError, match=r"no such variant \(did you mean 'conv2former_t'\?\)"):
        random_network("conv2former_tt")


def test_nothing_contributes():
    model = network()
    nn.init.zeros_(model.stem.conv1.weight)
    with pytest.raises(ConfigError, match="no pixel moves the middle of stage 1"):
        measure_fields(model, noise_images(1, 64), [1], "this")


def test_images_and_noise(tmp_path, official_file, tiny):
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    fields, note = measure_all([str(official_file)], [tiny], [1, 2], [str(tmp_path)], count=2, img_size=64)
    known = conv2former.inspect_checkpoint(official_file).name  # several registered variants may have its shape
    names = [(field.name.split()[0].strip(","), field.stage) for field in fields]
    assert names == [(known, 1), (known, 2), (tiny, 1), (tiny, 2)]
    assert note.startswith("effective receptive field of the middle of a stage, mean over 2 images\nrandom weights")
    _, note = measure_all([str(official_file)], [], [1], count=1, img_size=64)
    assert note.endswith("mean over 1 image of noise, standard normal values")
    table = fields_table(fields).splitlines()
    assert table[0].split()[:3] == ["network", "stage", "image"]
    assert len(table) == 5
    assert "64 x 64" in table[1]
    figure = fields_figure(fields, note)
    figure.canvas.draw()
    assert len(figure.axes) == 5  # and the scale


def test_networks_of_other_channels_take_noise_only(tmp_path, official_file):
    for channels in (1, 2):
        torch.save(network(in_chans=channels).state_dict(), tmp_path / f"{channels}.pt")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    grey, pairs = (([str(tmp_path / f"{channels}.pt")], [], [1]) for channels in (1, 2))
    with pytest.raises(CheckpointError, match="takes 2 channel"):
        measure_all(*pairs, [str(tmp_path / "a.png")], img_size=64)
    assert measure_all(*pairs, count=1, img_size=64)[0]
    assert measure_all(*grey, [str(tmp_path / "a.png")], img_size=64)[0]


def test_what_cannot_be_a_picture(tmp_path):
    for name, words in (("a.jsonl", "ends with .png, .pdf, .svg"), (".", "ends with")):
        with pytest.raises(OutputError, match=words):
            check_picture(tmp_path / name)


def script(monkeypatch, *words) -> int:
    return run_script(monkeypatch, "receptive_field.py", *words)


def test_script(monkeypatch, capsys, official_file, tmp_path):
    output = tmp_path / "field.png"
    words = ["--checkpoint", official_file, official_file, "--stage", 3, "--count", 1, "--img-size", 64]
    assert script(monkeypatch, *words, "--output", output) == 0
    out = capsys.readouterr().out
    assert "1 image of noise" in out
    assert out.count(" px (") == 8
    with Image.open(output) as image:
        assert image.width > image.height
    for more, expected in (
        ([*words[:-1], 16], "error: the preprocessing: 1 mistake:\n  - data.img_size:"),
        ([*words, "--images", tmp_path / "none"], "none: no such file or folder"),
        (["--checkpoint", tmp_path / "none"], "none: no such file"),
        (["--model", "resnet50"], "--model resnet50: no such variant"),
        ([], "give --checkpoint FILE or --model NAME"),
    ):
        assert script(monkeypatch, *more, "--output", tmp_path / "other.png") == 2
        assert expected in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["field.png"]
