from __future__ import annotations

import pytest
import torch

from conv2former import Conv2FormerBlock, ConvMlp, ConvMod


@pytest.mark.parametrize(
    ("module", "kernel_size", "size"),
    [
        (Conv2FormerBlock, 7, (64, 48)),
        (Conv2FormerBlock, 11, (7, 13)),
        (Conv2FormerBlock, 21, (3, 1)),  # the map is smaller than the kernel
        (Conv2FormerBlock, 1, (5, 5)),
        (ConvMod, 5, (9, 4)),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_size_and_odd_kernel(module, kernel_size, size, memory_format):
    x = torch.randn(2, 16, *size).contiguous(memory_format=memory_format)
    assert module(16, kernel_size=kernel_size)(x).shape == x.shape


@pytest.mark.slow
def test_the_readme_call():
    block = Conv2FormerBlock(64, kernel_size=7, mlp_ratio=4, drop_path=0.1)
    with torch.inference_mode():
        assert block(torch.randn(1, 64, 640, 480)).shape == (1, 64, 640, 480)


@pytest.mark.parametrize("kernel_size", [0, 2, 8, -3, 3.0])
def test_an_even_kernel_is_refused(kernel_size):
    with pytest.raises(ValueError, match="odd"):
        Conv2FormerBlock(8, kernel_size=kernel_size)


def test_a_drop_path_of_one_is_refused():
    with pytest.raises(ValueError, match="drop_path"):
        Conv2FormerBlock(8, drop_path=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    block = Conv2FormerBlock(8, kernel_size=3, ls_init_value=1.0, dtype=dtype)
    x = torch.randn(1, 8, 6, 5, dtype=dtype)
    out = block(x)
    assert out.dtype == dtype
    reference = block.double()(x.double())
    assert torch.allclose(out.double(), reference, rtol=0.05, atol=0.05)


def test_autocast():
    block = Conv2FormerBlock(8, kernel_size=3, ls_init_value=1.0)
    x = torch.randn(1, 8, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    assert torch.allclose(out.float(), block(x), rtol=0.05, atol=0.05)


def test_the_modulation_is_a_product():
    """Doubling the value branch doubles the output, as with neither a sum nor a gate on the product."""
    mod = ConvMod(8, kernel_size=3).double()
    torch.nn.init.zeros_(mod.proj.bias)
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    once = mod(x)
    with torch.no_grad():
        mod.v.weight.mul_(2)
        mod.v.bias.mul_(2)
    assert torch.allclose(mod(x), 2 * once)


def test_the_mlp_sees_neighbours():
    mlp = ConvMlp(4).double()
    x = torch.zeros(1, 4, 5, 5, dtype=torch.float64)
    y = x.clone()
    y[..., 2, 2] = torch.arange(4)
    changed = (mlp(x) - mlp(y)).abs().sum(1)[0] > 1e-12
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(changed, expected)


def test_drop_path_drops_branches_of_samples():
    block = Conv2FormerBlock(4, kernel_size=3, drop_path=0.5, ls_init_value=1.0)
    x = torch.randn(1, 4, 3, 3).expand(64, -1, -1, -1)
    torch.manual_seed(0)
    unchanged = (block.train()(x) == x).flatten(1).all(1).float().mean()
    assert 0.1 < unchanged < 0.45  # a quarter of the samples skips both branches
    assert not torch.equal(block.eval()(x)[0], x[0])


def test_without_layer_scale():
    names = {name for name, _ in Conv2FormerBlock(4, kernel_size=3, ls_init_value=None).named_parameters()}
    assert not any("ls" in name for name in names)
