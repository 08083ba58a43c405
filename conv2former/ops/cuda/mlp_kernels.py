"""The Triton kernels of the MLP's spatial mixing; `mixing.py` cuts the work and runs them.

Each goes down the rows of a map with three rows of it in registers:

    columns of a lane    -1 | 0 ... S - 1 | S      lanes beside each other: channels, then strips, then images
    row i - 1  above      .   .  .  .  .    .
    row i      here       .   .  .  .  .    .      its S columns of the result are written, then each row moves up
    row i + 1  below      .   .  .  .  .    .      GELU, if any, is applied as it comes: 1 + 2 / S times for each number
    row i + 2  ahead      .   .  .  .  .    .      on its way from memory, as it is there

A program has BLOCK lanes, two for each thread, and `block_rows` rows: as many as leave programs enough to fill the GPU,
since a piece reads and computes the rows above and below it again. The weight is as PyTorch has it, (C, 1, 3, 3). Sums
are in float32 for every type of map, and nothing is added by atomics: the same input gives the same bits.
"""

# mypy: ignore-errors
# What stands in a kernel is Triton's language, not Python: its types are those of registers.

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import find_lane, find_row, gelu, gelu_slope, load_columns, load_raw, wide, width_of, zeros

__all__ = ["mlp_backward_kernel", "mlp_input_grad_kernel", "mlp_kernel"]

# A map of another size and another batch run the kernels that are compiled; other channels and types compile new ones.
SIZES = ["N", "H", "W", "strips", "row_blocks", "block_rows"]


@triton.jit
def find_block(N, H, W, strips, row_blocks, C: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    """Returns of this program's lanes: which exist, the part of the map, channel, first column, where its row 0 begins.

    A part is a row block of a strip of an image.
    """
    mask, image, strip, channel = find_lane(tl.program_id(0) // row_blocks, N, strips, C, BLOCK)
    part = ((image * strips + strip) * row_blocks + tl.program_id(0) % row_blocks).to(tl.int64)
    return mask, part, channel, strip * S, find_row(image, channel, strip * S, H, W, C)


@triton.jit
def gelu_of(raw):
    """Applies GELU to a tuple of values."""
    values = ()
    for t in tl.static_range(len(raw)):
        values += (gelu(raw[t].to(tl.float32)),)
    return values


@triton.jit
def load_taps(weight_ptr, channel):
    """Loads the nine taps of a 3 x 3 weight."""
    taps = ()
    for tap in tl.static_range(9):
        taps += (tl.load(weight_ptr + channel * 9 + tap).to(tl.float32),)
    return taps


@triton.jit(do_not_specialize=SIZES)
def mlp_kernel(
    f_ptr, weight_ptr, bias_ptr, out_ptr, N, H, W, strips, row_blocks, block_rows,
    C: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes h + gelu(3 x 3 depthwise convolution of h + bias), h = gelu(f), down `block_rows` rows of BLOCK lanes.

    Three rows of h are in registers, one of them new at each step, so that GELU is computed 1 + 2 / S times.
    """
    mask, _, channel, column, start = find_block(N, H, W, strips, row_blocks, C, S, BLOCK)
    first = (tl.program_id(0) % row_blocks) * block_rows
    row_size = W.to(tl.int64) * C
    taps = load_taps(weight_ptr, channel)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    f_ptr += start
    end = tl.minimum(first + block_rows, H)
    above = gelu_of(load_raw(f_ptr + (first - 1) * row_size, mask, column, width_of(first - 1, H, W), -1, S + 2, C))
    here = gelu_of(load_raw(f_ptr + first * row_size, mask, column, width_of(first, H, W), -1, S + 2, C))
    ahead = load_raw(f_ptr + (first + 1) * row_size, mask, column, width_of(first + 1, H, W), -1, S + 2, C)
    for i in range(first, end):
        below = gelu_of(ahead)
        more = tl.where(i + 1 < end, width_of(i + 2, H, W), 0)
        ahead = load_raw(f_ptr + (i + 2) * row_size, mask, column, more, -1, S + 2, C)
        for s in tl.static_range(S):
            z = bias
            for dx in tl.static_range(3):
                z += above[s + dx] * taps[dx]
                z += here[s + dx] * taps[3 + dx]
                z += below[s + dx] * taps[6 + dx]
            out_row_ptr = out_ptr + start + i * row_size
            tl.store(out_row_ptr + s * C, here[s + 1] + gelu(z), mask=mask & (column + s < W))
        above = here
        here = below


@triton.jit(do_not_specialize=SIZES)
def mlp_backward_kernel(
    f_ptr, out_grad_ptr, weight_ptr, bias_ptr, grad_ptr, partial_ptr, N, H, W, strips, row_blocks, block_rows,
    C: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of what the 3 x 3 convolution in `mlp_kernel` puts out, and the sums that give its weight's.

    Writes (10, C) sums for each strip of each row block, the bias's last, and leaves room for another (C,).
    """
    mask, part, channel, column, start = find_block(N, H, W, strips, row_blocks, C, S, BLOCK)
    first = (tl.program_id(0) % row_blocks) * block_rows
    row_size = W.to(tl.int64) * C
    taps = load_taps(weight_ptr, channel)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    f_ptr += start
    end = tl.minimum(first + block_rows, H)
    above = gelu_of(load_raw(f_ptr + (first - 1) * row_size, mask, column, width_of(first - 1, H, W), -1, S + 2, C))
    here = gelu_of(load_raw(f_ptr + first * row_size, mask, column, width_of(first, H, W), -1, S + 2, C))
    ahead = load_raw(f_ptr + (first + 1) * row_size, mask, column, width_of(first + 1, H, W), -1, S + 2, C)
    sums = zeros(10, (BLOCK,))
    for i in range(first, end):
        below = gelu_of(ahead)
        more = tl.where(i + 1 < end, width_of(i + 2, H, W), 0)
        ahead = load_raw(f_ptr + (i + 2) * row_size, mask, column, more, -1, S + 2, C)
        out_grads = load_columns(out_grad_ptr + start + i * row_size, mask, column, W, 0, S, C)
        for s in tl.static_range(S):
            z = bias
            for dx in tl.static_range(3):
                z += above[s + dx] * taps[dx]
                z += here[s + dx] * taps[3 + dx]
                z += below[s + dx] * taps[6 + dx]
            grad = out_grads[s] * gelu_slope(z)
            tl.store(grad_ptr + start + i * row_size + s * C, grad, mask=mask & (column + s < W))
            added = ()
            for dx in tl.static_range(3):
                added += (sums[dx] + grad * above[s + dx],)
            for dx in tl.static_range(3):
                added += (sums[3 + dx] + grad * here[s + dx],)
            for dx in tl.static_range(3):
                added += (sums[6 + dx] + grad * below[s + dx],)
            added += (sums[9] + grad,)
            sums = added
        above = here
        here = below
    for tap in tl.static_range(10):
        tl.store(partial_ptr + (part * 11 + tap) * C + channel, sums[tap], mask=mask)


@triton.jit(do_not_specialize=SIZES)
def mlp_input_grad_kernel(
    grad_ptr, out_grad_ptr, f_ptr, weight_ptr, f_grad_ptr, partial_ptr, N, H, W, strips, row_blocks, block_rows,
    C: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of f in `mlp_kernel`: (out_grad + convolution of grad with the flipped weight) * gelu'(f).

    `grad` is what `mlp_backward_kernel` puts out; three rows of it are in registers, one of them new at each step. The
    sums over the result's pixels go where that kernel has left room.
    """
    mask, part, channel, column, start = find_block(N, H, W, strips, row_blocks, C, S, BLOCK)
    first = (tl.program_id(0) % row_blocks) * block_rows
    row_size = W.to(tl.int64) * C
    taps = load_taps(weight_ptr, channel)
    grad_ptr += start
    end = tl.minimum(first + block_rows, H)
    above = wide(load_raw(grad_ptr + (first - 1) * row_size, mask, column, width_of(first - 1, H, W), -1, S + 2, C))
    here = wide(load_raw(grad_ptr + first * row_size, mask, column, width_of(first, H, W), -1, S + 2, C))
    ahead = load_raw(grad_ptr + (first + 1) * row_size, mask, column, width_of(first + 1, H, W), -1, S + 2, C)
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in range(first, end):
        below = wide(ahead)
        more = tl.where(i + 1 < end, width_of(i + 2, H, W), 0)
        ahead = load_raw(grad_ptr + (i + 2) * row_size, mask, column, more, -1, S + 2, C)
        out_grads = load_columns(out_grad_ptr + start + i * row_size, mask, column, W, 0, S, C)
        f = load_columns(f_ptr + start + i * row_size, mask, column, W, 0, S, C)
        for s in tl.static_range(S):
            total = out_grads[s]
            for dx in tl.static_range(3):
                total += above[s + dx] * taps[8 - dx]
                total += here[s + dx] * taps[5 - dx]
                total += below[s + dx] * taps[2 - dx]
            f_grad = total * gelu_slope(f[s])
            exists = mask & (column + s < W)
            sums += tl.where(exists, f_grad, 0.0)
            tl.store(f_grad_ptr + start + i * row_size + s * C, f_grad, mask=exists)
        above = here
        here = below
    tl.store(partial_ptr + (part * 11 + 10) * C + channel, sums, mask=mask)
